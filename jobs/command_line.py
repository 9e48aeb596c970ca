"""The command line of every job: typed flags from a config class, presets, and how a job ends.

Only this file and recipe_flag.py know tyro. Importing them stays cheap, for `--help` is instant.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro
from recipe_flag import field_docs, nearest, recipe_help, recipe_rule
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from albef_core.config import Recipe
from albef_core.errors import InputError, Preempted
from pipelines.config import (
    AuditConfig,
    EmbedConfig,
    FinetuneConfig,
    PlanConfig,
    PretrainConfig,
    QuickstartConfig,
    TrainConfig,
)
from pipelines.crawl_config import CrawlConfig
from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig
from pipelines.ingest_config import IngestConfig
from pipelines.presets import UNSET
from pipelines.sweep_config import SweepConfig

Config = TypeVar("Config")
Training = TypeVar("Training", bound=TrainConfig)

HELP = ("-h", "--help")
ALIASES = {"lr": "--learning-rate"}
# Two lengths of one run: naming one takes away what the preset says of the other.
RIVALS = {"steps": "epochs", "epochs": "steps"}
# Fields that are words of the command and no flags.
WORDS = ("one", "other")
# Flags that may stand alone, and what they mean then.
ALONE = {"resume": "newest"}
SAVED_AS = {
    PretrainConfig: "a run's saved config.json, in place of a preset",
    PlanConfig: "a run's saved config.json, in place of a preset",
    FinetuneConfig: "a run's saved config.json, in place of a task",
    SweepConfig: "a sweep's saved config.json, in place of a preset",
    CrawlConfig: "the config.json of a crawl",
    IngestConfig: "the config.json beside a corpus's manifest",
    EvaluateConfig: "an evaluation's evaluate.json, in its MLflow run under eval/CORPUS/",
    EvaluateTaskConfig: "an evaluation's evaluate.json, in its MLflow run under eval/CORPUS/",
    EmbedConfig: "the config.json of embeddings",
    AuditConfig: "the config.json of an audit",
    EvaluateGroundingConfig: "an evaluation's evaluate.json, in its MLflow run under eval/CORPUS/",
    QuickstartConfig: "the config.json of an earlier quickstart",
}
"""What `--config` reads, by the class that the file holds; a class not here has no such flag."""
FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
PREEMPTED = 75
"""Exit code of a training that was asked to stop: EX_TEMPFAIL, run it again and it goes on."""


def parse(config_class: type[Config], *, args: Sequence[str] | None = None) -> Config:
    """Read `[--config FILE] [flags]`, for a job that has neither presets nor tasks.

    Raises:
        InputError: a flag is unknown, missing or impossible.
    """
    words, doc = _command(args), inspect.getdoc(config_class) or ""
    start = _saved(config_class, words)
    return _read_flags(config_class, words, prog=_program(), doc=doc, start=start)


def parse_task(
    tasks: Mapping[str, tuple[str, type[Config]]],
    *,
    kind: str = "task",
    args: Sequence[str] | None = None,
) -> tuple[str, Config]:
    """Read `TASK [--config FILE] [flags]`; `tasks` holds a sentence and a config class by name.

    `kind` is what the first word is called.

    Raises:
        InputError: the task is none of `tasks`, or a flag is unknown, missing or impossible.
    """
    words = _command(args)
    name = _first_word(words, {name: doc for name, (doc, _class) in tasks.items()}, kind)
    doc, config_class = tasks[name]
    start = _saved(config_class, words)
    prog = f"{_program()} {name}"
    return name, _read_flags(config_class, words[1:], prog=prog, doc=doc, start=start)


def parse_preset(
    presets: Mapping[str, Callable[[], Training]],
    *,
    kind: str = "preset",
    note: str = "",
    args: Sequence[str] | None = None,
) -> Training:
    """Read `PRESET [--config FILE] [flags]` or `--config FILE [flags]`; `kind` names a preset.

    `note` is a line of help.

    Flags change the file, and the file replaces the preset. A run without `--name` is named after
    its preset and the time: a name taken over from the file would be an older run's.

    Raises:
        InputError: the preset, a flag or the file is unknown, missing or impossible.
    """
    words = _command(args)
    docs = {name: inspect.getdoc(preset) or "" for name, preset in presets.items()}
    config_class = type(next(iter(presets.values()))())
    saved = _saved(config_class, words)
    if saved is not None and words[0] not in presets:
        name, prog, doc = "config", _program(), _config_help(config_class)
    else:
        name = _first_word(words, docs, kind, file_of=config_class, note=note)
        words, prog, doc = words[1:], f"{_program()} {name}", f"{docs[name]}\n\n{note}".rstrip()
    start = presets[name]() if saved is None else saved
    config = _read_flags(config_class, words, prog=prog, doc=doc, start=start)
    if "--name" in _given(words):
        return config
    if config.resume:
        return dataclasses.replace(config, name="")  # the run that has the checkpoint
    return dataclasses.replace(config, name=f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def run_job(main: Callable[[], object]) -> None:
    """Run a job to its exit code.

    0: done; 1: failed (traceback), or what was to be examined did not pass (a table of reasons); 2:
    refused input (one line); 75: stopped with a good checkpoint (one line), so that a scheduler may
    start the same command again.
    """
    _set_up_logging()
    try:
        main()
    except InputError as error:
        _end(str(error), 2)
    except Preempted as error:
        _end(str(error), PREEMPTED)
    except FILE_ERRORS as error:
        if error.filename is None:
            raise
        _end(f"{error.filename}: {error.strerror}. Check the path.", 2)


def _end(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{Path(sys.argv[0]).stem}: {' '.join(message.split())}\n")
    raise SystemExit(code)


def _set_up_logging() -> None:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False)
        line = "%(message)s"
    else:
        handler = logging.StreamHandler()
        line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, handlers=[handler])
    for name in ("albef_core", "pipelines", "jobs"):
        logging.getLogger(name).setLevel(logging.INFO)


def _program() -> str:
    return Path(sys.argv[0]).name


def _command(args: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if args is None else args)


def _first_word(
    words: Sequence[str],
    docs: Mapping[str, str],
    kind: str,
    *,
    file_of: type | None = None,
    note: str = "",
) -> str:
    """Return the preset or task that the command starts with; on `--help` list them and end.

    With `file_of` the command may start with a saved file of that class instead.
    """
    if words and words[0] in docs:
        return words[0]
    names = ", ".join(docs)
    if words and words[0] in HELP:
        width = max(map(len, docs))
        lines = [f"  {name:{width}}  {doc.splitlines()[0]}" for name, doc in docs.items()]
        sys.stdout.write(
            f"usage: {_program()} {kind.upper()} [flags]\n\n" + "\n".join(lines) + "\n\n"
            f"All flags with their defaults: {_program()} {next(iter(docs))} --help\n"
        )
        if file_of is not None:
            sys.stdout.write(f"--config FILE: {_config_help(file_of)}\n")
        sys.stdout.write(f"{note}\n" if note else "")
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise InputError(f"The {kind} is missing. The command starts with one of: {names}.")
    raise InputError(f"{words[0]!r} is no {kind}.{nearest(words[0], docs)} There are: {names}.")


def _saved(config_class: type[Config], words: Sequence[str]) -> Config | None:
    file = _value_after("--config", words)
    if file is None or config_class not in SAVED_AS:
        return None
    # cattrs takes half of a second's budget for help, and most commands name no file.
    from pipelines.config_file import read_config

    return read_config(Path(file), config_class)


def _config_help(config_class: type) -> str:
    return f"Start from {SAVED_AS[config_class]}; other flags change it."


def _value_after(flag: str, words: Sequence[str]) -> str | None:
    for i, word in enumerate(words):
        if word == flag:
            return words[i + 1] if i + 1 < len(words) else None
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _given(words: Sequence[str]) -> set[str]:
    return {word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _leaves(config_class: type) -> Iterator[dataclasses.Field]:
    """Yield the fields that are one flag each, those of nested configs included."""
    for field in dataclasses.fields(config_class):
        if field.type is Recipe or not dataclasses.is_dataclass(field.type):
            yield field
        else:
            assert isinstance(field.type, type)
            yield from _leaves(field.type)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_flags(
    config_class: type[Config],
    words: Sequence[str],
    *,
    prog: str,
    doc: str,
    start: Config | None = None,
) -> Config:
    """Parse `words` over the values of `start`, or over the class's own defaults."""
    given = _given(words)
    if not set(HELP) & set(words):
        _check_names(config_class, given, start)
    for name, rival in RIVALS.items():
        if _flag(name) in given and getattr(start, rival, None) is not None:
            # The 1 is a stand-in that the flag itself replaces.
            start = dataclasses.replace(start, **{name: 1, rival: None})  # pyright: ignore[reportArgumentType, reportCallIssue]  # a bare TypeVar is no dataclass
            break
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                config_class,
                prog=prog,
                description=doc,
                args=list(words),
                default=tyro.MISSING_NONPROP if start is None else start,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
                registry=_registry(config_class),
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(_own_message(error) or _unboxed(box.getvalue())) from None


def _check_names(config_class: type, given: set[str], start: object | None) -> None:
    known = {"--config"} if config_class in SAVED_AS else set()
    for field in _leaves(config_class):
        known |= {_flag(field.name), ALIASES.get(field.name, _flag(field.name))}
        if field.type is bool:
            known.add(f"--no-{_flag(field.name)[2:]}")
    for flag in sorted(given - known):
        raise InputError(f"{flag} is not a flag of this job.{nearest(flag, sorted(known))}")
    flags = (field for field in _leaves(config_class) if field.name not in WORDS)
    for field in flags:
        no_default = dataclasses.MISSING is field.default is field.default_factory
        filled = start is not None and getattr(start, field.name, UNSET) != UNSET
        if no_default and not filled and _flag(field.name) not in given:
            raise InputError(
                f"{_flag(field.name)} is missing. {field_docs(config_class)[field.name]}"
            )


def _own_message(error: BaseException) -> str:
    """Return the sentence of the InputError that made tyro exit, or "" if it was tyro's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__context__
    return ""


def _unboxed(box: str) -> str:
    """Turn tyro's framed complaint into one line: its first paragraph, without the frame."""
    side, rule = "\u2502", "\u2500"
    lines = [line.strip(f"{side} ") for line in box.splitlines() if line.startswith(side)]
    end = next((i for i, line in enumerate(lines) if line.startswith(rule)), len(lines))
    return " ".join(" ".join(lines[:end]).split())


def _registry(config_class: type) -> ConstructorRegistry:
    """Tell tyro what the config classes, standard library only, cannot say themselves."""
    registry = ConstructorRegistry()
    registry.primitive_rule(recipe_rule)
    inside: set[type] = set()

    @registry.struct_rule
    def add_to_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type in inside or not dataclasses.is_dataclass(info.type):
            return None
        inside.add(info.type)
        spec = registry.get_struct_spec(info)  # the next rule, since this one now steps aside
        inside.remove(info.type)
        assert isinstance(spec, StructConstructorSpec)
        fields = tuple(_described(field) for field in spec.fields)
        if info.type is not config_class or config_class not in SAVED_AS:
            return dataclasses.replace(spec, fields=fields)
        helptext = _config_help(config_class)
        file = StructFieldSpec("config", Path | None, None, helptext=helptext)  # pyright: ignore[reportArgumentType]  # tyro takes unions
        return StructConstructorSpec(
            lambda config, **values: spec.instantiate(**values), (fields[0], file, *fields[1:])
        )

    return registry


def _described(field: StructFieldSpec) -> StructFieldSpec:
    if field.type is Recipe:
        return dataclasses.replace(field, helptext=recipe_help())
    if field.name in ALONE:
        return dataclasses.replace(field, type=Annotated[field.type, _may_stand_alone(field.name)])
    if field.name in WORDS:
        word = tyro.conf.arg(metavar=field.name.upper())
        return dataclasses.replace(field, type=Annotated[tyro.conf.Positional[field.type], word])
    if field.name in ALIASES:
        alias = tyro.conf.arg(aliases=[ALIASES[field.name]])
        return dataclasses.replace(field, type=Annotated[field.type, alias])
    if field.default == UNSET:
        return dataclasses.replace(field, default=tyro.MISSING_NONPROP)
    return field


def _may_stand_alone(name: str) -> PrimitiveConstructorSpec[str]:
    def read(words: list[str]) -> str:
        if len(words) > 1:
            raise InputError(f"{_flag(name)} takes one value or none, got {' '.join(words)}.")
        return words[0] if words else ALONE[name]

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[PATH]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )
