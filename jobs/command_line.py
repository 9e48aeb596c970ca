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
from typing import Annotated, TypeVar

import tyro
from recipe_flag import field_docs, nearest, recipe_help, recipe_rule
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from albef_core.config import Recipe
from albef_core.errors import InputError
from pipelines.config import PretrainConfig
from pipelines.presets import UNSET

Config = TypeVar("Config")

HELP = ("-h", "--help")
ALIASES = {"lr": "--learning-rate"}
# Two lengths of one run: naming one takes away what the preset says of the other.
RIVALS = {"steps": "epochs", "epochs": "steps"}
CONFIG_HELP = "Start from a run's saved config.json in place of a preset; other flags change it."
FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def parse(config_class: type[Config], *, args: Sequence[str] | None = None) -> Config:
    """Read the flags of a job that has neither presets nor tasks.

    Raises:
        InputError: a flag is unknown, missing or impossible.
    """
    doc = inspect.getdoc(config_class) or ""
    return _read_flags(config_class, _command(args), prog=_program(), doc=doc)


def parse_task(
    tasks: Mapping[str, tuple[str, type[Config]]], *, args: Sequence[str] | None = None
) -> tuple[str, Config]:
    """Read `TASK [flags]`: the task's name and its config; `tasks` holds a sentence and a class.

    Raises:
        InputError: the task is none of `tasks`, or a flag is unknown, missing or impossible.
    """
    words = _command(args)
    name = _first_word(words, {name: doc for name, (doc, _class) in tasks.items()}, "task")
    doc, config_class = tasks[name]
    return name, _read_flags(config_class, words[1:], prog=f"{_program()} {name}", doc=doc)


def parse_preset(
    presets: Mapping[str, Callable[[], PretrainConfig]], *, args: Sequence[str] | None = None
) -> PretrainConfig:
    """Read `PRESET [--config FILE] [flags]` or `--config FILE [flags]`.

    Flags change the file, and the file replaces the preset. A run without `--name` is named after
    its preset and the time: a name taken over from the file would be an older run's.

    Raises:
        InputError: the preset, a flag or the file is unknown, missing or impossible.
    """
    words = _command(args)
    docs = {name: inspect.getdoc(preset) or "" for name, preset in presets.items()}
    file = _value_after("--config", words)
    if file is not None and words[0] not in presets:
        name, prog, doc = "config", _program(), CONFIG_HELP
    else:
        name = _first_word(words, docs, "preset")
        words, prog, doc = words[1:], f"{_program()} {name}", docs[name]
    start = presets[name]() if file is None else _read_saved(Path(file), PretrainConfig)
    config = _read_flags(PretrainConfig, words, prog=prog, doc=doc, start=start)
    if "--name" in _given(words):
        return config
    return dataclasses.replace(config, name=f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def run_job(main: Callable[[], object]) -> None:
    """Run a job to its exit code: 0 done, 1 failed (traceback), 2 refused input (one line)."""
    _set_up_logging()
    try:
        main()
    except InputError as error:
        _refuse(str(error))
    except FILE_ERRORS as error:
        if error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}. Check the path.")


def _refuse(message: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).stem}: {' '.join(message.split())}\n")
    raise SystemExit(2)


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


def _first_word(words: Sequence[str], docs: Mapping[str, str], kind: str) -> str:
    """Return the preset or task that the command starts with; on `--help` list them and end."""
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
        if kind == "preset":
            sys.stdout.write(f"--config FILE: {CONFIG_HELP}\n")
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise InputError(f"The {kind} is missing. The command starts with one of: {names}.")
    raise InputError(f"{words[0]!r} is no {kind}.{nearest(words[0], docs)} There are: {names}.")


def _read_saved(file: Path, config_class: type[Config]) -> Config:
    # cattrs takes half of a second's budget for help, and most commands name no file.
    from pipelines.config_file import read_config

    return read_config(file, config_class)


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
        if start is not None and _flag(name) in given and getattr(start, rival) is not None:
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
                registry=_registry(config_class, with_file=start is not None),
            )
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(_own_message(error) or _unboxed(box.getvalue())) from None


def _check_names(config_class: type, given: set[str], start: object | None) -> None:
    known = {"--config"} if start is not None else set()
    for field in _leaves(config_class):
        known |= {_flag(field.name), ALIASES.get(field.name, _flag(field.name))}
        if field.type is bool:
            known.add(f"--no-{_flag(field.name)[2:]}")
    for flag in sorted(given - known):
        raise InputError(f"{flag} is not a flag of this job.{nearest(flag, sorted(known))}")
    for field in _leaves(config_class):
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


def _registry(config_class: type, *, with_file: bool) -> ConstructorRegistry:
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
        if info.type is not config_class or not with_file:
            return dataclasses.replace(spec, fields=fields)
        file = StructFieldSpec("config", Path | None, None, helptext=CONFIG_HELP)  # pyright: ignore[reportArgumentType]  # tyro takes unions
        return StructConstructorSpec(
            lambda config, **values: spec.instantiate(**values), (fields[0], file, *fields[1:])
        )

    return registry


def _described(field: StructFieldSpec) -> StructFieldSpec:
    if field.type is Recipe:
        return dataclasses.replace(field, helptext=recipe_help())
    if field.name in ALIASES:
        alias = tyro.conf.arg(aliases=[ALIASES[field.name]])
        return dataclasses.replace(field, type=Annotated[field.type, alias])
    if field.default == UNSET:
        return dataclasses.replace(field, default=tyro.MISSING_NONPROP)
    return field
