import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from command_line import parse, parse_preset, parse_task
from recipe_flag import field_docs, parse_recipe

from albef_core.config import Recipe, corrected, format_recipe, paper_2021
from albef_core.errors import InputError
from pipelines.config import (
    AuditConfig,
    EmbedConfig,
    PretrainConfig,
    QuickstartConfig,
)
from pipelines.config_file import write_config
from pipelines.crawl_config import CrawlConfig
from pipelines.evaluation_config import EvaluateConfig
from pipelines.ingest_config import IngestConfig
from pipelines.presets import PRETRAIN, base, tiny
from pipelines.registry_config import DiffConfig

JOBS = Path(__file__).parents[2] / "jobs"
TASKS = {"retrieval": ("Zero-shot retrieval.", EvaluateConfig)}


def pretrain(command: str) -> PretrainConfig:
    return parse_preset(PRETRAIN, args=command.split())


def leaves(config_class: type) -> list[str]:
    names: list[str] = []
    for field in dataclasses.fields(config_class):
        nested = dataclasses.is_dataclass(field.type) and field.type is not Recipe
        names += leaves(field.type) if nested else [field.name]  # type: ignore[arg-type]
    return names


@pytest.mark.parametrize(
    "config_class",
    [
        IngestConfig,
        CrawlConfig,
        PretrainConfig,
        EvaluateConfig,
        EmbedConfig,
        AuditConfig,
        QuickstartConfig,
    ],
)
def test_flat_flags_have_one_owner_each(config_class: type) -> None:
    names = leaves(config_class)

    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_preset_with_a_corpus_and_a_name_is_the_preset(name: str) -> None:
    config = pretrain(f"{name} --corpus c --name n")

    assert config == dataclasses.replace(PRETRAIN[name](), corpus=Path("c"), name="n")


def test_flags_of_nested_configs_are_flat() -> None:
    config = pretrain("tiny --corpus c --alpha 0.2 --lr 3e-4 --image-size 32 --max-words=9 --flip")

    assert config.objective.alpha == 0.2
    assert config.optim.lr == 3e-4
    assert config.model.image_size == 32
    assert config.text.max_words == 9
    assert config.augment.flip


def test_no_flip_turns_the_default_off() -> None:
    assert base().augment.flip
    assert not pretrain("base --corpus c --no-flip").augment.flip


def test_learning_rate_is_another_name_of_lr() -> None:
    assert pretrain("tiny --corpus c --learning-rate 0.5").optim.lr == 0.5


def test_a_run_without_a_name_is_named_after_its_preset() -> None:
    assert pretrain("small --corpus c").name.startswith("small-2")


def test_steps_take_the_place_of_the_preset_s_epochs() -> None:
    config = pretrain("tiny --corpus c --steps 7")

    assert (config.steps, config.epochs) == (7, None)


def test_epochs_take_the_place_of_a_file_s_steps(tmp_path: Path) -> None:
    write_config(dataclasses.replace(tiny(), steps=7, epochs=None), tmp_path / "config.json")

    config = pretrain(f"--config {tmp_path / 'config.json'} --corpus c --epochs=3")

    assert (config.steps, config.epochs) == (None, 3)


@pytest.mark.parametrize("start", ["", "base "])
def test_a_file_replaces_the_preset_and_flags_change_the_file(start: str, tmp_path: Path) -> None:
    saved = dataclasses.replace(tiny(), corpus=Path("c"), name="yesterday", seed=5)
    write_config(saved, tmp_path / "config.json")

    config = pretrain(f"{start}--config {tmp_path / 'config.json'} --batch-size 32 --name today")

    assert config == dataclasses.replace(saved, batch_size=32, name="today")


def test_a_run_from_a_file_does_not_take_over_the_older_run_s_name(tmp_path: Path) -> None:
    saved = dataclasses.replace(tiny(), corpus=Path("c"), name="yesterday")
    write_config(saved, tmp_path / "config.json")

    assert pretrain(f"--config {tmp_path / 'config.json'}").name.startswith("config-2")


@pytest.mark.parametrize(
    ("flags", "value"), [("--resume", "newest"), ("--resume runs/a", "runs/a"), ("", "")]
)
def test_resume_stands_alone_or_names_a_checkpoint(flags: str, value: str) -> None:
    assert pretrain(f"tiny --corpus c {flags} --force").resume == value
    assert pretrain(f"tiny --corpus c --force {flags}").force


def test_a_job_without_presets_reads_its_class() -> None:
    config = parse(IngestConfig, args=["--source", "shapes", "--out", "c", "--num-images", "9"])

    assert config == IngestConfig(source="shapes", out=Path("c"), num_images=9)


def test_a_flag_may_take_several_files() -> None:
    flags = ["--source", "s", "--annotations", "a.json", "b.json", "--out", "c"]

    config = parse(IngestConfig, args=flags)

    assert config.annotations == (Path("a.json"), Path("b.json"))
    assert config.out == Path("c")


def test_a_job_without_presets_starts_from_a_file_and_flags_change_it(tmp_path: Path) -> None:
    saved = IngestConfig(source="shapes", out=Path("old"), num_images=9, seed=4)
    write_config(saved, tmp_path / "config.json")

    config = parse(IngestConfig, args=["--config", str(tmp_path / "config.json"), "--out", "new"])

    assert config == dataclasses.replace(saved, out=Path("new"))


def test_steps_change_the_file_of_a_job_that_knows_no_epochs(tmp_path: Path) -> None:
    write_config(QuickstartConfig(steps=9, seed=3), tmp_path / "config.json")

    config = parse(QuickstartConfig, args=[f"--config={tmp_path / 'config.json'}", "--steps", "5"])

    assert config == QuickstartConfig(steps=5, seed=3)


def test_a_task_starts_from_a_file_and_flags_change_it(tmp_path: Path) -> None:
    saved = EvaluateConfig(model="m", corpus=Path("c"), top_k=16)
    write_config(saved, tmp_path / "evaluate.json")
    args = ["retrieval", "--config", str(tmp_path / "evaluate.json"), "--corpus", "d"]

    _name, config = parse_task(TASKS, args=args)

    assert config == dataclasses.replace(saved, corpus=Path("d"))


def test_two_versions_are_words_and_no_flags() -> None:
    acts = {"diff": ("Show two versions.", DiffConfig)}

    _act, config = parse_task(acts, kind="act", args=["diff", "models:/a/1", "models:/a/2"])

    assert config == DiffConfig(one="models:/a/1", other="models:/a/2")
    with pytest.raises(InputError, match=r"Missing from .*: OTHER"):
        parse_task(acts, kind="act", args=["diff", "models:/a/1"])
    with pytest.raises(InputError, match=r"'dif' is no act\. Did you mean diff\?"):
        parse_task(acts, kind="act", args=["dif"])


def test_the_file_of_another_job_is_refused(tmp_path: Path) -> None:
    write_config(tiny(), tmp_path / "config.json")

    with pytest.raises(InputError, match=r"unknown key"):
        parse_task(TASKS, args=["retrieval", "--config", str(tmp_path / "config.json")])


def test_a_task_comes_first_and_names_its_class() -> None:
    args = ["retrieval", "--model", "models:/a/1", "--corpus", "c", "--json", "out.json"]

    name, config = parse_task(TASKS, args=args)

    assert name == "retrieval"
    assert config == EvaluateConfig(model="models:/a/1", corpus=Path("c"), json=Path("out.json"))


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("corrected", corrected()),
        ("paper-2021", paper_2021()),
        ("corrected,negatives=local", dataclasses.replace(corrected(), negatives="local")),
        ("paper-2021,keep_sep=true", dataclasses.replace(paper_2021(), keep_sep=True)),
        (
            "corrected,quiet_teacher=false,words_only=false",
            dataclasses.replace(corrected(), quiet_teacher=False, words_only=False),
        ),
    ],
)
def test_a_recipe_is_one_flag_that_reads_back_what_it_writes(text: str, recipe: Recipe) -> None:
    assert parse_recipe(text) == recipe
    assert parse_recipe(format_recipe(recipe)) == recipe
    assert pretrain(f"tiny --corpus c --recipe {text}").recipe == recipe


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_every_field_of_a_recipe_can_be_changed_alone(field: dataclasses.Field) -> None:
    choices = [True, False] if field.type is bool else get_args(field.type)
    # With local negatives, which go with either value of every other field.
    start = dataclasses.replace(corrected(), negatives="local")
    for value in choices:
        changed = dataclasses.replace(start, **{field.name: value})
        text = f"corrected,negatives=local,{field.name}={str(value).lower()}"
        assert parse_recipe(text) == changed
        assert parse_recipe(format_recipe(changed)) == changed


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "The preset is missing."),
        ("--corpus c", "The preset is missing."),
        ("tinny --corpus c", "'tinny' is no preset. Did you mean tiny?"),
        ("tiny", "--corpus is missing. Corpus folder"),
        ("tiny --corpus", "Missing value for argument '--corpus'"),
        ("tiny --corpsu c", "--corpsu is not a flag of this job. Did you mean --corpus?"),
        ("tiny --corpus c --alfa 0.1", "--alfa is not a flag of this job. Did you mean --alpha?"),
        ("tiny --corpus c stray", "Unrecognized options: stray"),
        ("tiny --corpus c --batch-size many", "--batch-size: invalid literal for int()"),
        ("tiny --corpus c --batch-size 2.5", "--batch-size: invalid literal for int()"),
        ("tiny --corpus c --batch-size -4", "--batch-size is a count of at least 1, got -4."),
        ("tiny --corpus c --batch-size 0", "--batch-size is a count of at least 1, got 0."),
        ("tiny --corpus c --workers -1", "--workers is a count of at least 0, got -1."),
        ("tiny --corpus c --resume a b", "--resume takes one value or none, got a b."),
        ("tiny --corpus c --steps 0", "--steps is a count of at least 1, got 0."),
        ("tiny --corpus c --epochs -1", "--epochs is a count of at least 1, got -1."),
        ("tiny --corpus c --steps 3 --epochs 3", "--steps 3 and --epochs 3 contradict each other."),
        ("tiny --corpus c --alpha 2", "--alpha lies between 0 and 1, got 2.0."),
        ("tiny --corpus c --alpha nan", "--alpha lies between 0 and 1, got nan."),
        ("tiny --corpus c --lr inf", "--lr is a positive rate, got inf."),
        ("tiny --corpus c --image-layers -1", "--image-layers is a count of at least 1, got -1."),
        ("tiny --corpus c --patch-size 0", "--patch-size is a count of at least 1, got 0."),
        ("tiny --corpus c --beta1 1", "--beta1 is a share in [0, 1), got 1.0."),
        ("tiny --corpus c --rand-level 11", "--rand-level lies between 0 and 10, got 11."),
        ("tiny --corpus c --mask-share -0.1", "--mask-share lies between 0 and 1, got -0.1."),
        ("tiny --corpus c --temperature 0", "--temperature lies between 0.001 and 0.5, got 0.0."),
        ("tiny --corpus c --num-slots 0", "--num-slots is a count of at least 1, got 0."),
        ("tiny --corpus c --lr 0", "--lr is a positive rate, got 0.0."),
        ("tiny --corpus c --min-lr 1", "--min-lr lies between 0 and --lr (0.002), got 1.0."),
        ("tiny --corpus c --dropout 1", "--dropout is a share in [0, 1), got 1.0."),
        (
            "tiny --corpus c --image-size 60",
            "--image-size 60 is not a multiple of --patch-size 16.",
        ),
        ("tiny --corpus c --text-heads 3", "--text-width 128 is not a multiple of --text-heads 3."),
        ("tiny --corpus c --device tpu", "invalid choice 'tpu' for argument '--device'."),
        ("tiny --corpus c --precision fp8", "invalid choice 'fp8' for argument '--precision'."),
        ("tiny --corpus c --recipe paper-2020", "'paper-2020' is none. Did you mean paper-2021?"),
        ("tiny --corpus c --recipe corrected,keepsep=true", "Did you mean keep_sep?"),
        ("tiny --corpus c --recipe corrected,keep_sep=1", "keep_sep is `true` or `false`, got '1'"),
        (
            "tiny --corpus c --recipe corrected,negatives=near",
            "negatives is `global` or `local`, got 'near'",
        ),
        ("tiny --corpus c --recipe corrected,global_keys=false", "or negatives=local."),
        ("tiny --corpus c --config", "Missing value for argument '--config'"),
        ("--config no/such.json", "no/such.json: No such file or directory."),
    ],
)
def test_an_impossible_command_is_one_line(command: str, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        pretrain(command)

    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--out", "c"], "--source is missing."),
        (["--source", "shapes", "--out", "c", "--num-images", "0"], "--num-images is a count"),
        (
            ["--source", "shapes", "--out", "c", "--wrong-captions", "1.5"],
            "between 0 and 1, got 1.5",
        ),
        (["--out", "c", "--config", "no/such.json"], "no/such.json: No such file"),
    ],
)
def test_impossible_flags_of_ingest_are_one_line(args: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse(IngestConfig, args=args)


def test_an_unknown_task_is_named_with_the_ones_there_are() -> None:
    with pytest.raises(InputError, match=r"'retrieves' is no task\. Did you mean retrieval\?"):
        parse_task(TASKS, args=["retrieves"])


def test_an_unknown_key_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"corpus": "c", "epoch": 3}')

    with pytest.raises(InputError, match=r"unknown key epoch\. Did you mean epochs\?"):
        pretrain(f"--config {tmp_path / 'config.json'}")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=JOBS.parent,
    )


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pretrain.py tiny", "pretrain: --corpus is missing. "),
        (
            "pretrain.py tiny --corpus c --alpha 2",
            "pretrain: --alpha lies between 0 and 1, got 2.0.",
        ),
        ("pretrain.py tiny --corpus c --device tpu", "pretrain: invalid choice 'tpu'"),
        ("evaluate.py retrieval --corpus c", "evaluate: --model is missing. "),
        ("crawl.py --out c --source l", "crawl: --contact is missing: "),
    ],
)
def test_a_job_refuses_with_one_line_and_exit_code_2(command: str, line: str) -> None:
    job, *flags = command.split()

    process = run(JOBS / job, *flags)

    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith(line)
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "pretrain.py --help",
        "pretrain.py tiny --help",
        "evaluate.py retrieval -h",
        "evaluate.py grounding -h",
        "explain.py --help",
        "promote.py check --help",
        "crawl.py --help",
    ],
)
def test_help_answers_without_the_heavy_libraries(command: str) -> None:
    job, *flags = command.split()
    program = (
        f"import runpy, sys; sys.path.insert(0, {str(JOBS)!r}); sys.argv = {[job, *flags]!r}\n"
        f"try: runpy.run_path({str(JOBS / job)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'cattrs'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )

    process = run("-c", program)

    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"usage: {job}")


def test_help_says_what_every_flag_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        pretrain("tiny --help")

    assert not end.value.code
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    flags = [f"--{name.replace('_', '-')}" for name in leaves(PretrainConfig)]
    assert [flag for flag in [*flags, "--config", "--learning-rate"] if flag not in text] == []
    assert "as in `paper-2021,keep_sep=true`" in text
    assert "(default: corrected)" in text
    assert [f for f, sentence in field_docs(Recipe).items() if f": {sentence}" not in text] == []
    assert "negatives=global|local: Hard negatives" in text
    assert "--resume [PATH]" in text
    assert "Peak learning rate. The paper: 1e-4 for batch 512. (default: 0.002)" in text


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        ("InputError('first\\n second')", "job: first second\n"),
        (
            "FileNotFoundError(2, 'No such file', 'x.json')",
            "job: x.json: No such file. Check the path.\n",
        ),
    ],
)
def test_a_mistake_of_the_user_ends_a_job_with_2(failure: str, line: str, tmp_path: Path) -> None:
    process = run(job_that_raises(failure, tmp_path))

    assert (process.returncode, process.stderr) == (2, line)


def test_a_training_that_was_asked_to_stop_ends_a_job_with_75(tmp_path: Path) -> None:
    process = run(job_that_raises("Preempted('stopped at step 7')", tmp_path))

    assert (process.returncode, process.stderr) == (75, "job: stopped at step 7\n")


@pytest.mark.parametrize("failure", ["ValueError('ours')", "FileNotFoundError('unnamed')"])
def test_a_failure_of_ours_ends_a_job_with_1_and_its_traceback(
    failure: str, tmp_path: Path
) -> None:
    process = run(job_that_raises(failure, tmp_path))

    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")


def job_that_raises(failure: str, folder: Path) -> Path:
    job = folder / "job.py"
    job.write_text(
        f"import sys; sys.path.insert(0, {str(JOBS)!r})\n"
        "from command_line import run_job\nfrom albef_core.errors import InputError, Preempted\n"
        f"def main(): raise {failure}\nrun_job(main)\n"
    )
    return job


def test_jobs_are_doorways() -> None:
    helpers = {"bars.py", "command_line.py", "plan_table.py", "recipe_flag.py"}
    jobs = [file for file in JOBS.glob("*.py") if file.name not in helpers]

    assert jobs
    assert [f.name for f in jobs if len(f.read_text().splitlines()) > 40] == []
