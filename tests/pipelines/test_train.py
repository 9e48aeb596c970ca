"""A pre-training through the real Ray Train, the real feed and the real MLflow."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow import MlflowClient

from albef_core.config import ObjectiveConfig
from albef_core.errors import InputError
from albef_core.weights import load_model
from pipelines.config import PretrainConfig
from pipelines.config_file import read_config
from pipelines.evaluate import evaluate_retrieval
from pipelines.evaluation_config import EvaluateConfig
from pipelines.manifest import read_manifest, write_manifest
from pipelines.presets import tiny
from pipelines.train import TrainResult, pretrain
from tests.conftest import SmallCorpus

STEPS = 14
BATCH = 16


def small_run(corpus: Path, root: Path, **changes: object) -> PretrainConfig:
    preset = tiny()
    config = dataclasses.replace(
        preset,
        corpus=corpus,
        storage=root / "runs",
        name="run",
        steps=STEPS,
        epochs=None,
        batch_size=BATCH,
        workers=2,
        log_every=2,
        model=dataclasses.replace(
            preset.model, image_size=32, image_width=32, image_layers=1, text_width=32
        ),
        objective=ObjectiveConfig(num_slots=24),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


BROKEN = ("picture-005", "picture-040", "picture-100", "picture-150")


@pytest.fixture(scope="module")
def worn_corpus(make_corpus: Callable[..., SmallCorpus]) -> SmallCorpus:
    """A corpus of 203 pictures, four of which do not decode, that says which run made it."""
    corpus = make_corpus(203, broken=[int(name[-3:]) for name in BROKEN])
    manifest = read_manifest(corpus.folder)
    write_manifest(dataclasses.replace(manifest, settings={"run_id": "the-run-of-ingest"}))
    return corpus


@pytest.fixture(scope="module")
def finished(local_ray: None, worn_corpus: SmallCorpus, store: Path) -> TrainResult:
    """One run of two workers over one epoch and a bit, shared by the tests of this file."""
    patch = pytest.MonkeyPatch()
    with patch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
        # Relative names, because workers run in another folder than the driver.
        environment.chdir(worn_corpus.folder.parent)
        return pretrain(small_run(Path(worn_corpus.folder.name), store))


@pytest.mark.cluster
@pytest.mark.slow
def test_a_training_leaves_one_run_with_curves_pictures_and_tags(
    finished: TrainResult, store: Path
) -> None:
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    runs = [
        run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])
    ]
    assert [run.info.run_id for run in runs] == [finished.handle.run_id]
    run = runs[0]
    assert run.info.status == "FINISHED"
    for name in (
        "train/loss/itc",
        "train/loss/itm",
        "train/loss/mlm",
        "train/temperature",
        "train/alpha",
        "train/lr",
        "train/queue_fill",
        "train/hard_negative_similarity",
        "train/itm_accuracy",
        "train/pairs_per_s",
        "train/memory_gb",
        "feed/wait_share",
        "pairs_seen",
    ):
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [2, 4, 6, 8, 10, 12, 14], name
    pairs = client.get_metric_history(run.info.run_id, "pairs_seen")
    assert pairs[-1].value == STEPS * BATCH
    assert run.data.tags["corpus.run"] == "the-run-of-ingest"
    for tag in ("corpus.id", "recipe", "git.commit", "weights.image", "weights.text"):
        assert run.data.tags[tag], tag
    assert run.data.tags["world_size"] == "2"
    assert run.data.params["objective.num_slots"] == "24"
    bad = client.get_metric_history(run.info.run_id, "feed/bad_images")
    names = client.download_artifacts(run.info.run_id, "bad_images.json", str(store))
    named = json.loads(Path(names).read_text())["did_not_decode"]
    assert set(named) <= set(BROKEN)
    assert 0 < len(named) <= bad[-1].value
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "pictures")]
    assert any("hard-negatives" in path for path in pictures)
    assert any("pseudo-targets" in path for path in pictures)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_queue_holds_what_the_workers_saw_and_the_teacher_moved(
    finished: TrainResult,
) -> None:
    from safetensors.torch import load_file

    newest = max(finished.run_dir.glob("checkpoint-*"))
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == STEPS
    moving = load_file(newest / "teacher.safetensors")
    assert moving["queues.image.is_valid"].all()
    assert moving["queues.image.pointer"] == (STEPS * BATCH) % 24
    student = load_file(newest / "model.safetensors")
    assert moving["vision_proj_m.weight"].shape == student["vision_proj.weight"].shape
    assert not moving["vision_proj_m.weight"].equal(student["vision_proj.weight"])


@pytest.mark.cluster
@pytest.mark.slow
def test_a_process_alone_learns_what_two_workers_learn_and_goes_on_where_it_was(
    finished: TrainResult,
    worn_corpus: SmallCorpus,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    alone = small_run(worn_corpus.folder, store, name="alone", workers=0, register="")
    first = pretrain(alone)
    second = pretrain(dataclasses.replace(alone, steps=STEPS + 2))

    assert second.handle == first.handle
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    (*learned, last), workers = (
        client.get_metric_history(run_id, "train/loss/itc")
        for run_id in (second.handle.run_id, finished.handle.run_id)
    )
    assert [point.step for point in learned] == [point.step for point in workers]
    # Sums are taken in another order, and the weights of 14 steps drift apart.
    assert [p.value for p in learned] == pytest.approx([p.value for p in workers], rel=1e-3)
    assert last.step == STEPS + 2


@pytest.mark.cluster
@pytest.mark.slow
def test_the_saved_config_starts_the_same_run_again(finished: TrainResult) -> None:
    config = read_config(finished.run_dir / "config.json", PretrainConfig)
    assert config.objective.num_slots == 24
    assert config.model.vocab_size == 0, "as asked for, so that it fits another corpus too"
    loaded = load_model(finished.model)
    assert loaded.model_config.vocab_size == loaded.tokenizer.vocab_size


@pytest.mark.cluster
@pytest.mark.slow
def test_the_registered_model_answers_and_is_evaluated_into_its_own_run(
    finished: TrainResult,
    worn_corpus: SmallCorpus,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"sqlite:///{store}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert finished.stored.uri == "models:/albef-pretrain/1"
    result = evaluate_retrieval(
        EvaluateConfig(
            model=finished.stored.uri,
            corpus=worn_corpus.folder,
            json=store / "retrieval.json",
            top_k=4,
            bootstrap=50,
        )
    )
    assert result.run_id == finished.handle.run_id
    saved = json.loads((store / "retrieval.json").read_text())
    assert saved["num_images"] == worn_corpus.num_images - len(BROKEN)
    assert sorted(saved["undecodable"]) == sorted(BROKEN)
    for stage in ("itc", "itm"):
        assert 0 < saved["metrics"][stage]["mean_recall"]["chance"] < 0.1
    model = mlflow.pyfunc.load_model(finished.stored.uri)
    from pipelines.manifest import read_manifest, read_row_group

    group = read_manifest(worn_corpus.folder).row_groups()[0]
    table = read_row_group(worn_corpus.folder, group.shard, group.index, ["image", "captions"])
    picture = table["image"][0].as_py()
    answer = model.predict(pd.DataFrame({"image": [picture], "text": ["A red square."]}))
    assert -1 <= answer["similarity"][0] <= 1
    assert 0 <= answer["match"][0] <= 1


@pytest.mark.cluster
@pytest.mark.slow
def test_a_name_goes_on_as_what_it_was_or_not_at_all(
    finished: TrainResult,
    worn_corpus: SmallCorpus,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    with pytest.raises(InputError, match="other values of seed, which"):
        pretrain(small_run(worn_corpus.folder, store, seed=1))


@pytest.mark.cluster
def test_mistakes_are_refused_before_any_worker_starts(
    local_ray: None, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    too_many = small_run(small_corpus.folder, tmp_path, workers=16)
    with pytest.raises(InputError, match="leave none of the cluster"):
        pretrain(too_many)
    with pytest.raises(InputError, match="no-such-corpus"):
        pretrain(small_run(tmp_path / "no-such-corpus", tmp_path))
    with pytest.raises(InputError, match="203"):
        pretrain(small_run(small_corpus.folder, tmp_path, batch_size=512))
    missing = str(tmp_path / "bert.safetensors")
    with pytest.raises(InputError, match=r"bert\.safetensors"):
        pretrain(small_run(small_corpus.folder, tmp_path, text_weights=missing))


def test_pictures_without_captions_are_refused_before_ray_is_asked_for(
    make_corpus: Callable[..., SmallCorpus], tmp_path: Path
) -> None:
    corpus = make_corpus(8, uncaptioned=[2, 5]).folder
    with pytest.raises(InputError, match="2 of 8 pictures have no caption"):
        pretrain(small_run(corpus, tmp_path))
    assert not (tmp_path / "runs").exists()
