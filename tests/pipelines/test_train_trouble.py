"""Trainings that meet trouble: awkward batches, losses that are not finite, workers that freeze."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from albef_core.config import OptimConfig, corrected
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tokenizer import Tokenizer
from albef_core.weights import save_model
from pipelines.config import PretrainConfig
from pipelines.order import epoch_order
from pipelines.pairs import image_key, open_corpus
from pipelines.tracking import RunHandle
from pipelines.train import pretrain
from tests.albef_core.literal import Ring
from tests.conftest import SmallCorpus, picture_row, write_corpus
from tests.pipelines.test_train import BATCH, small_run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_SLOTS = 24
LONG = 16  # tokens that no caption of `picture_row` reaches


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def image_ids_of(corpus: Path, *, seed: int, steps: range, batch_size: int) -> list[str]:
    """Name the images of some steps of epoch 0, in the plan's order."""
    opened = open_corpus(corpus)
    order = epoch_order(opened.group_rows, seed=seed, epoch=0)
    rows = order[steps.start * batch_size : steps.stop * batch_size]
    return [opened.read(int(row)).image_id for row in rows]


def skipped_batches(run_dir: Path, out: Path) -> dict[str, Any]:
    """Read the artifact as a user downloads it."""
    handle = RunHandle.of(run_dir)
    assert handle is not None
    file = MlflowClient(handle.uri).download_artifacts(
        handle.run_id, "skipped_batches.json", str(out)
    )
    return json.loads(Path(file).read_text())


def losses_of(run_dir: Path) -> dict[int, float]:
    handle = RunHandle.of(run_dir)
    assert handle is not None
    points = MlflowClient(handle.uri).get_metric_history(handle.run_id, "train/loss/total")
    return {point.step: point.value for point in points}


UNEVEN, UNEVEN_STEPS = 61, 3
"""Pairs of a batch that neither queue nor workers divide, and the steps of an epoch."""


@pytest.fixture(scope="module")
def uneven(
    local_ray: None, small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory
) -> PretrainConfig:
    """A finished run of such batches."""
    root = tmp_path_factory.mktemp("uneven")
    config = small_run(
        small_corpus.folder,
        root,
        batch_size=UNEVEN,
        steps=UNEVEN_STEPS,
        log_every=1,
        checkpoint_every=1,
        max_bad_steps=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        pretrain(config)
    return config


def test_a_batch_that_fits_neither_queue_nor_workers_leaves_the_literal_ring(
    uneven: PretrainConfig,
) -> None:
    run_dir = uneven.storage / uneven.name
    losses = losses_of(run_dir)
    assert list(losses) == list(range(1, UNEVEN_STEPS + 1))
    assert all(math.isfinite(loss) for loss in losses.values())
    queues = load_file(run_dir / f"checkpoint-{UNEVEN_STEPS:08d}" / "teacher.safetensors")
    ring = Ring(NUM_SLOTS)
    steps = range(UNEVEN_STEPS)
    ids = image_ids_of(uneven.corpus, seed=uneven.seed, steps=steps, batch_size=UNEVEN)
    ring.push([image_key(image_id) for image_id in ids])
    for side in ("image", "text"):
        assert queues[f"queues.{side}.image_ids"].tolist() == ring.rows
        assert queues[f"queues.{side}.is_valid"].all()
        assert queues[f"queues.{side}.pointer"] == ring.next


def test_a_rate_that_ruins_the_weights_ends_the_run_with_the_checkpoint_from_before_named(
    uneven: PretrainConfig, tmp_path: Path
) -> None:
    rate = OptimConfig(lr=1e30, min_lr=0.0, warmup_steps=0)
    config = dataclasses.replace(uneven, steps=4 * UNEVEN_STEPS, optim=rate, force=True)
    with pytest.raises(InputError, match="of 3 batches in a row is not finite") as refusal:
        pretrain(config)
    run_dir = uneven.storage / uneven.name
    report = skipped_batches(run_dir, tmp_path)
    # The step after the first run is taken, and leaves weights of 1e30 in the checkpoint after it.
    assert [record["step"] for record in report["skipped"]] == [4, 5, 6]
    assert report["num_skipped"] == 3
    for record in report["skipped"]:
        assert len(record["image_ids"]) == len(set(record["image_ids"])) == UNEVEN
        assert len(record["captions"]) == UNEVEN
    named = str(refusal.value).split("The newest good checkpoint is ")[1].split(": --resume")[0]
    assert named == f"{run_dir}/checkpoint-{UNEVEN_STEPS:08d}"
    assert "a lower --lr" in str(refusal.value)


@pytest.fixture
def corpus_with_one_long_caption(tmp_path: Path) -> SmallCorpus:
    """The small corpus with one more picture, the only one whose caption has many words."""
    rows = [picture_row(number) for number in range(204)]
    rows[203] |= {"image_id": "long-winded", "captions": [" ".join(["a red square"] * 10)]}
    write_corpus(tmp_path / "corpus", rows, rows_per_shard=120, rows_per_group=16)
    captions = (caption for row in rows for caption in row["captions"])
    Tokenizer.learn(captions, vocab_size=300).save(tmp_path / "tokenizer")
    return SmallCorpus(tmp_path / "corpus", tmp_path / "tokenizer", len(rows))


def test_one_batch_that_meets_a_damaged_weight_is_skipped_and_training_goes_on(
    local_ray: None,
    corpus_with_one_long_caption: SmallCorpus,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    corpus = corpus_with_one_long_caption
    steps = corpus.num_images // BATCH
    config = small_run(
        corpus.folder, tmp_path, steps=steps, log_every=1, init=str(tmp_path / "damaged")
    )
    tokenizer = Tokenizer.load(corpus.tokenizer)
    sizes = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = ALBEF(sizes)
    with torch.no_grad():
        model.text_encoder.position_embeddings.weight[LONG] = torch.inf
    save_model(
        tmp_path / "damaged",
        model,
        model_config=sizes,
        text_config=config.text,
        recipe=corrected(),
        tokenizer=tokenizer,
    )
    places = image_ids_of(corpus.folder, seed=config.seed, steps=range(steps), batch_size=BATCH)
    bad_step = places.index("long-winded") // BATCH
    assert 0 < bad_step < steps - 1
    with caplog.at_level(logging.WARNING):
        result = pretrain(config)
    (record,) = skipped_batches(result.run_dir, tmp_path)["skipped"]
    assert record["step"] == bad_step
    # In the order of the global batch: what worker 0 held, then what worker 1 held.
    assert record["image_ids"] == places[bad_step * BATCH : (bad_step + 1) * BATCH]
    assert f"step {bad_step}: loss nan" in caplog.text
    losses = losses_of(result.run_dir)
    assert list(losses) == list(range(1, steps + 1))
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [bad_step + 1]
    queues = load_file(max(result.run_dir.glob("checkpoint-*")) / "teacher.safetensors")
    assert queues["queues.text.features"].isfinite().all()
    ring = Ring(NUM_SLOTS)
    kept = places[: bad_step * BATCH] + places[(bad_step + 1) * BATCH :]
    ring.push([image_key(image_id) for image_id in kept])
    assert queues["queues.image.image_ids"].tolist() == ring.rows
    trained = load_file(result.model / "model.safetensors")
    for name, tensor in trained.items():
        is_damaged = "position_embeddings" in name
        assert tensor[:LONG].isfinite().all() if is_damaged else tensor.isfinite().all(), name
