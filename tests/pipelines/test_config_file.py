import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albef_core.config import ModelConfig, OptimConfig, paper_2021
from albef_core.errors import InputError
from pipelines.config import (
    AuditConfig,
    AugmentConfig,
    EmbedConfig,
    ExplainConfig,
    PlanConfig,
    PretrainConfig,
    QuickstartConfig,
)
from pipelines.config_file import config_digest, read_config, write_config
from pipelines.crawl_config import CrawlConfig
from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig
from pipelines.ingest_config import CleaningConfig, IngestConfig, PackConfig
from pipelines.presets import PRETRAIN, tiny
from pipelines.registry_config import (
    Check,
    DiffConfig,
    Gate,
    HistoryConfig,
    PromoteConfig,
    RollbackConfig,
)
from pipelines.sweep_config import SweepConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", PRETRAIN.values(), ids=PRETRAIN)
def test_every_preset_comes_back_from_its_file(
    preset: Callable[[], PretrainConfig], tmp_path: Path
) -> None:
    write_config(preset(), tmp_path / "config.json")

    assert read_config(tmp_path / "config.json", PretrainConfig) == preset()


@pytest.mark.parametrize(
    "config",
    [
        IngestConfig(source="shapes", out=Path("a/b"), images=Path("pictures.tar")),
        IngestConfig(source="a.json", out=Path("a"), annotations=(Path("b"), Path("c"))),
        IngestConfig(
            source="crawl", out=Path("a"), cleaning=CleaningConfig(exclude_corpus=(Path("v"),))
        ),
        CrawlConfig(out=Path("c"), source=("a", "b"), contact="a@b", retry=("dns", "http 503")),
        EvaluateConfig(model="models:/albef-pretrain/1", corpus=Path("c"), json=None),
        QuickstartConfig(out=Path("q"), steps=9),
        dataclasses.replace(tiny(), recipe=paper_2021(), steps=7, epochs=None),
    ],
    ids=[
        "ingest",
        "ingest with a second file",
        "ingest of a crawl",
        "crawl",
        "evaluate",
        "quickstart",
        "pretrain with the 2021 recipe",
    ],
)
def test_every_job_s_config_comes_back_from_its_file(config: object, tmp_path: Path) -> None:
    write_config(config, tmp_path / "config.json")

    assert read_config(tmp_path / "config.json", type(config)) == config


@given(
    lr=st.floats(1e-8, 1e3), storage=st.text(st.characters(codec="utf-8", exclude_characters="\0"))
)
def test_any_rate_and_any_path_survive_the_file(
    lr: float, storage: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "config.json"
    config = dataclasses.replace(
        tiny(), optim=OptimConfig(lr=lr, min_lr=0.0), storage=Path(storage)
    )

    write_config(config, file)

    assert read_config(file, PretrainConfig) == config


def test_keys_that_the_file_leaves_out_keep_their_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"corpus": "c", "epochs": 2, "model": {"image_size": 64}}')

    config = read_config(file, PretrainConfig)

    expected = PretrainConfig(corpus=Path("c"), epochs=2, model=ModelConfig(image_size=64))
    assert config == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batchsize": 3}, "unknown key batchsize. Did you mean batch_size?"),
        ({"model": {"imagesize": 64}}, "model: unknown key imagesize. Did you mean image_size?"),
        ({"recipe": {"keepsep": True}}, "recipe: unknown key keepsep. Did you mean keep_sep?"),
        ({"zzz": 1}, "unknown key zzz. Remove it."),
        ({"batch_size": "3"}, 'batch_size: expected int, found "3".'),
        ({"batch_size": True}, "batch_size: expected int, found true."),
        ({"model": {"image_size": 64.5}}, "model.image_size: expected int, found 64.5."),
        ({"augment": {"flip": "no"}}, 'augment.flip: expected bool, found "no".'),
        (
            {"recipe": {"negatives": "near"}},
            "recipe.negatives: expected one of 'global', 'local'.",
        ),
        ({"device": "tpu"}, "device: expected one of 'auto', 'cpu', 'cuda'."),
        ({"model": 3}, "model: expected an object, found 3."),
        ({"objective": {"alpha": 2}}, "objective: --alpha lies between 0 and 1, got 2.0."),
        ({"steps": 3}, "--steps 3 and --epochs 10 contradict each other. Give one of them."),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_place(
    change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    write_config(tiny(), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(InputError, match=f"^{re.escape(f'{file}: {sentence}')}$"):
        read_config(file, PretrainConfig)


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"epochs": 3}')

    with pytest.raises(InputError, match="corpus: the key is missing"):
        read_config(tmp_path / "config.json", PretrainConfig)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory"),
        (b"{", "line 1: not JSON"),
        (b"[]", r"expected an object, found \[\]"),
        (b"\xff\xd8\xff", "not a text file"),
    ],
    ids=["absent", "cut off", "a list", "a picture"],
)
def test_a_file_that_is_no_config_is_refused(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(InputError, match=sentence):
        read_config(file, PretrainConfig)


def test_the_digest_ignores_how_a_number_was_written() -> None:
    whole, point = AugmentConfig(crop_scale_min=1), AugmentConfig(crop_scale_min=1.0)

    assert config_digest(whole) == config_digest(point)


def test_the_digest_is_the_sha256_of_the_json_with_sorted_keys() -> None:
    text = '{"crop_scale_min":0.5,"flip":false,"rand_level":7,"rand_ops":2}'

    digest = config_digest(AugmentConfig(crop_scale_min=0.5, flip=False))

    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_the_digest_survives_the_file(tmp_path: Path) -> None:
    write_config(tiny(), tmp_path / "config.json")

    restored = read_config(tmp_path / "config.json", PretrainConfig)

    assert config_digest(restored) == config_digest(tiny())


def config_fields(config_class: type) -> Iterator[str]:
    for field in dataclasses.fields(config_class):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from config_fields(field.type)
        yield f"{config_class.__name__}.{field.name}"


def attributes_read() -> set[str]:
    """Name the attributes that code reads; a config that checks its own field does not use it."""
    files = [
        file
        for folder in ("albef_core", "pipelines", "jobs")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "presets.py"
    ]
    read: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text()) for file in files]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        waiting += ast.iter_child_nodes(node)
    return read


@pytest.mark.parametrize(
    "config_class",
    [
        IngestConfig,
        PackConfig,
        CrawlConfig,
        PretrainConfig,
        PlanConfig,
        EvaluateConfig,
        EvaluateGroundingConfig,
        ExplainConfig,
        EmbedConfig,
        AuditConfig,
        QuickstartConfig,
        SweepConfig,
        Gate,
        Check,
        PromoteConfig,
        RollbackConfig,
        HistoryConfig,
        DiffConfig,
    ],
)
def test_every_field_of_a_config_is_read_somewhere(config_class: type) -> None:
    read = attributes_read()

    unread = [name for name in config_fields(config_class) if name.split(".")[1] not in read]

    assert not unread
