"""What a training starts from, by recipe and by `--init`, through the real Ray and MLflow."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from albef_core.config import ModelConfig, ObjectiveConfig, Recipe, paper_2021
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model, read_official, save_model, save_official
from pipelines.config import PretrainConfig
from pipelines.export import export
from pipelines.manifest import read_manifest
from pipelines.presets import tiny
from pipelines.start import prepare_start
from pipelines.train import TrainResult, pretrain
from tests.conftest import SmallCorpus
from tests.pipelines.test_train import small_run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# One head of 64 a side: an official file does not say how many there are.
MODEL = dataclasses.replace(
    tiny().model, image_size=32, image_width=64, image_heads=1, image_layers=1,
    text_width=64, text_heads=1, text_mlp_width=64, text_layers=1, fusion_layers=1,
)  # fmt: skip


@pytest.fixture
def start(
    local_ray: None, small_corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PretrainConfig:
    """This process alone, a store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return small_run(small_corpus.folder, tmp_path, workers=0, steps=2, model=MODEL, seed=5)


def tags_of(result: TrainResult) -> dict[str, str]:
    return MlflowClient(result.handle.uri).get_run(result.handle.run_id).data.tags


def official_file(folder: Path, corpus: SmallCorpus) -> Path:
    """Write an ALBEF.pth, with the vocabulary of `corpus` beside it."""
    model, config, _tokenizer = other_weights(corpus)
    queues = Queues(config, ObjectiveConfig(num_slots=8), Recipe())
    folder.mkdir()
    shutil.copy(corpus.tokenizer / "vocab.txt", folder)
    save_official(folder / "ALBEF.pth", model, Teacher(config, model), queues, config)
    return folder / "ALBEF.pth"


def folder_of_ours(folder: Path, corpus: SmallCorpus) -> Path:
    model, config, tokenizer = other_weights(corpus)
    save_model(
        folder,
        model,
        model_config=config,
        text_config=tiny().text,
        recipe=Recipe(),
        tokenizer=tokenizer,
    )
    return folder


def other_weights(corpus: SmallCorpus) -> tuple[ALBEF, ModelConfig, Tokenizer]:
    """Make a model that no seed of a run makes."""
    tokenizer = Tokenizer.load(corpus.tokenizer)
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(999)
    return ALBEF(config), config, tokenizer


def test_the_published_recipe_runs_to_a_model_that_the_official_format_takes(
    start: PretrainConfig, tmp_path: Path
) -> None:
    result = pretrain(dataclasses.replace(start, recipe=paper_2021(), steps=14))

    assert tags_of(result)["recipe"] == "paper-2021"
    client = MlflowClient(result.handle.uri)
    fill = client.get_metric_history(result.handle.run_id, "train/queue_fill")
    assert {point.value for point in fill} == {1.0}, "the published queues start full of noise"
    loaded = load_model(result.model)
    assert loaded.recipe == paper_2021()
    assert loaded.report.missing == ()
    newest = max(result.run_dir.glob("checkpoint-*"))
    export(str(newest), tmp_path / "out" / "ALBEF.pth")
    state = read_official(tmp_path / "out" / "ALBEF.pth")
    assert state["queues.pointer"].item() == (14 * 16) % 24
    student, teacher = state["image_projection.weight"], state["teacher.image_projection.weight"]
    assert student.equal(loaded.model.image_projection.weight)
    assert not student.equal(teacher)


@pytest.mark.parametrize("write", [official_file, folder_of_ours])
def test_init_starts_from_exactly_the_given_weights_and_the_tags_say_so(
    write, start: PretrainConfig, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    given = write(tmp_path / "given", small_corpus)
    config = dataclasses.replace(start, init=str(given))

    _config, tags = prepare_start(config, read_manifest(config.corpus), tmp_path / "start")

    expected = load_model(given).model.state_dict()
    made = load_model(tmp_path / "start").model.state_dict()
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())
    num_weights = len(list(load_model(given).model.parameters()))
    assert_are_named(tags, given, num_weights=num_weights)


def assert_are_named(tags: dict[str, str], given: Path, *, num_weights: int) -> None:
    for tag in ("weights.image", "weights.text"):
        assert str(given) in tags[tag]
        assert f"{num_weights} matched, 0 missing, 0 unexpected" in tags[tag]


def test_init_of_other_widths_is_refused_in_one_sentence(
    start: PretrainConfig, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    given = folder_of_ours(tmp_path / "given", small_corpus)
    wider = dataclasses.replace(MODEL, image_width=128, image_heads=2)

    with pytest.raises(InputError, match=r"--init .*given.*--image-width") as refusal:
        pretrain(dataclasses.replace(start, init=str(given), model=wider))

    assert "\n" not in str(refusal.value)
