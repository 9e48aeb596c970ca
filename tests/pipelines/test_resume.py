"""A training that is killed, stopped or moved goes on as if nothing had happened, bit for bit."""

import dataclasses
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from albef_core.errors import InputError, Preempted
from pipelines.checkpoint_store import CheckpointStore
from pipelines.config import PretrainConfig
from pipelines.train import pretrain
from tests.conftest import SmallCorpus
from tests.pipelines.test_train import small_run

STEPS = 24
STEP_TIMEOUT_S = 30
"""So long may a group of workers take to start on a busy machine."""
CURVES = ("train/loss/total", "train/loss/itc", "train/loss/itm", "train/loss/mlm")


def run_of(corpus: SmallCorpus, root: Path, **changes: object) -> PretrainConfig:
    """Two workers, dropout on, every step logged, a checkpoint every five."""
    config = small_run(corpus.folder, root, steps=STEPS, log_every=1, checkpoint_every=5)
    model = dataclasses.replace(config.model, dropout=0.1)
    return dataclasses.replace(config, model=model, **changes)


def curves_of(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of the loss curves of the one run in a store."""
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'albef-pretrain'")
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        name: sorted((p.step, p.value) for p in client.get_metric_history(run.info.run_id, name))
        for name in CURVES
    }


def state_of(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: student, teacher, queues and AdamW."""
    found = CheckpointStore(str(run_dir), keep_last=2).newest_good()
    assert found is not None
    assert found.progress.step == STEPS
    with found.fetch() as folder:
        tensors = load_file(folder / "model.safetensors") | load_file(
            folder / "teacher.safetensors"
        )
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    for index, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    return tensors


def assert_equal(root: Path, undisturbed: Path) -> None:
    assert curves_of(root) == curves_of(undisturbed)
    assert [step for step, _ in curves_of(root)[CURVES[0]]] == list(range(1, STEPS + 1))
    found, expected = state_of(root / "runs" / "run"), state_of(undisturbed / "runs" / "run")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def store_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Give a function that puts the MLflow store into a folder."""
    return lambda root: monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")


@pytest.fixture(scope="module")
def undisturbed(
    local_ray: None, small_corpus: SmallCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        pretrain(run_of(small_corpus, root))
    return root


def when_step_is_reached(run_dir: Path, step: int, act: Callable[[], None]) -> threading.Thread:
    """Act once a checkpoint of at least this step lies in the run's folder."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            steps = CheckpointStore(str(run_dir), keep_last=2).list_steps()
            if steps and steps[-1] >= step:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def train_workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("RayTrainWorker" in word for word in process.info["cmdline"] or [])
        and psutil.Process() in process.parents()
    ]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_worker_freezes_another_is_killed_and_every_loss_and_tensor_is_the_same(
    undisturbed: Path,
    small_corpus: SmallCorpus,
    tmp_path: Path,
    store_in: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    store_in(tmp_path)
    run_dir, frozen = tmp_path / "runs" / "run", []

    def freeze() -> None:
        frozen.append(train_workers()[-1])
        frozen[0].send_signal(signal.SIGSTOP)

    freezer = when_step_is_reached(run_dir, 5, freeze)
    killer = when_step_is_reached(run_dir, 15, lambda: train_workers()[-1].kill())
    try:
        with caplog.at_level(logging.WARNING):
            pretrain(run_of(small_corpus, tmp_path, step_timeout_s=STEP_TIMEOUT_S))
        freezer.join()
        killer.join()
        assert not frozen[0].is_running()
    finally:
        for process in frozen:
            if process.is_running():
                process.kill()
    # The other worker waits for the frozen one, in the middle of a step or of an agreement.
    named = r"rank \d: no step for 3\d s: stuck in (step|collective) since step \d+ \([23]?\d s\)"
    assert re.search(named, caplog.text)
    assert_equal(tmp_path, undisturbed)


@pytest.mark.cluster
@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(
    undisturbed: Path,
    small_corpus: SmallCorpus,
    tmp_path: Path,
    store_in: Callable[[Path], None],
) -> None:
    store_in(tmp_path)
    config = run_of(small_corpus, tmp_path)
    run_dir = tmp_path / "runs" / "run"
    stopper = when_step_is_reached(run_dir, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="is good"):
        pretrain(config)
    stopper.join()
    (stopped_at, *_) = CheckpointStore(str(run_dir), keep_last=2).list_steps()[::-1]
    assert 5 < stopped_at < STEPS
    # Without a name: the run with the newest checkpoint is meant.
    pretrain(dataclasses.replace(config, name="", resume="newest"))
    assert_equal(tmp_path, undisturbed)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_new_run_grows_from_a_checkpoint_of_another_with_other_workers(
    undisturbed: Path,
    small_corpus: SmallCorpus,
    tmp_path: Path,
    store_in: Callable[[Path], None],
) -> None:
    store_in(tmp_path)
    kept = CheckpointStore(str(undisturbed / "runs" / "run"), keep_last=2)
    first = min(kept.list_steps())
    path = f"{undisturbed}/runs/run/checkpoint-{first:08d}"
    config = run_of(
        small_corpus, tmp_path, name="grown", resume=path, workers=1, micro_batch_size=3
    )
    result = pretrain(config)
    client = MlflowClient(result.handle.uri)
    points = client.get_metric_history(result.handle.run_id, "train/loss/total")
    expected = dict(curves_of(undisturbed)["train/loss/total"])
    assert [p.step for p in points] == list(range(first + 1, STEPS + 1))
    for point in points:
        assert point.value == pytest.approx(expected[point.step], rel=1e-5)


@pytest.mark.cluster
def test_a_checkpoint_of_another_objective_is_refused_by_its_fields(
    undisturbed: Path,
    small_corpus: SmallCorpus,
    tmp_path: Path,
    store_in: Callable[[Path], None],
) -> None:
    store_in(tmp_path)
    newest = max((undisturbed / "runs" / "run").glob("checkpoint-*"))
    config = run_of(small_corpus, tmp_path, name="other", resume=str(newest))
    objective = dataclasses.replace(config.objective, alpha=0.1)
    with pytest.raises(InputError, match=r"other values of objective\.alpha, which"):
        pretrain(dataclasses.replace(config, objective=objective))
    with pytest.raises(InputError, match="no run"):
        pretrain(dataclasses.replace(config, name="", resume="newest"))
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"optimizer\.pt is truncated"):
        pretrain(config)
