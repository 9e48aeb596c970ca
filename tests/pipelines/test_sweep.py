"""A sweep through the real Ray Tune, the real trainings and the real MLflow."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import psutil
import pytest
from mlflow import MlflowClient

from albef_core.config import ObjectiveConfig, OptimConfig
from albef_core.errors import InputError
from pipelines.presets import SWEEP, tiny
from pipelines.sweep import sweep
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_report import answer, sweep_table
from pipelines.sweep_result import SweepResult
from tests.conftest import SmallCorpus, picture_row, write_corpus

STEPS, BATCH = 8, 16
RUINOUS = 1e30


def small_sweep(corpus: Path, val: Path, root: Path, **changes: Any) -> SweepConfig:
    start = SWEEP["tiny"]()
    config = dataclasses.replace(
        start,
        corpus=corpus,
        val=val,
        storage=root / "runs",
        name="search",
        steps=STEPS,
        epochs=None,
        batch_size=BATCH,
        log_every=2,
        trials=4,
        axes=("objective.alpha=0.1,0.9", f"optim.lr=1e-3,{RUINOUS}"),
        search="grid",
        milestones=(2 * BATCH,),
        confirm_seeds=1,
        bootstrap=50,
        max_bad_steps=0,
        model=dataclasses.replace(
            start.model, image_size=32, image_width=32, image_layers=1, text_width=32
        ),
        objective=ObjectiveConfig(num_slots=24, alpha=0.4),
        optim=OptimConfig(lr=2e-3, min_lr=0.0, warmup_steps=0),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def val(root: Path) -> Path:
    rows = [picture_row(1000 + number) for number in range(24)]
    return write_corpus(root / "val", rows, rows_per_shard=24, rows_per_group=16).folder


@pytest.fixture(scope="module")
def found(local_ray: None, small_corpus: SmallCorpus, val: Path, root: Path) -> SweepResult:
    """One sweep over a grid, with a rate that ruins any model, shared by the tests of this file.

    A trial is killed as soon as one has measured something.
    """
    is_over = Event()
    killer = Thread(target=kill_a_trial, args=[root / "runs" / "search" / "trials", is_over])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        config = small_sweep(small_corpus.folder, val, root, trials=5)
        killer.start()
        try:
            return sweep(config, preset="tiny", start=tiny())
        finally:
            is_over.set()
            killer.join()


def kill_a_trial(folder: Path, is_over: Event) -> None:
    """Kill -9 the process of a trial, once one has measured something and goes on."""
    while not is_over.is_set():
        for record in folder.glob("*/trial.json"):
            if json.loads(record.read_text())["is_done"]:
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any("ImplicitFunc" in word for word in process.cmdline()):
                        process.kill()
                        (folder / "killed").touch()
                        return
        time.sleep(0.02)


@pytest.mark.cluster
@pytest.mark.slow
def test_every_setting_is_tried_and_one_that_ruins_its_model_is_recorded(
    found: SweepResult,
) -> None:
    assert (Path(found.folder) / "trials" / "killed").exists()
    points = {(t.point["objective.alpha"], t.point["optim.lr"]): t for t in found.trials}
    assert set(points) == {(0.4, 2e-3), (0.1, 1e-3), (0.9, 1e-3), (0.1, RUINOUS), (0.9, RUINOUS)}
    assert [t.point["objective.alpha"] for t in found.trials if t.is_default] == [0.4]
    num_unheard = 0
    for (_alpha, rate), trial in points.items():
        if rate == RUINOUS:
            assert trial.status == "failed"
            assert "in a row is not finite" in trial.reason
        elif trial.status == "finished":
            measured = [pairs for pairs, _ in trial.measured]
            assert measured in ([2 * BATCH, STEPS * BATCH], [STEPS * BATCH])
            num_unheard += len(measured) == 1
        else:
            assert trial.status == "stopped"
            assert [pairs for pairs, _ in trial.measured] == [2 * BATCH]
    assert any(trial.status == "finished" for trial in found.trials)
    assert num_unheard <= 1, "only of the one that was killed, in the moment after it measured"


@pytest.mark.cluster
@pytest.mark.slow
def test_the_parent_run_has_the_report_and_a_child_for_each_trial(
    found: SweepResult, root: Path
) -> None:
    client = MlflowClient(found.tracking_uri)
    parent = client.get_run(found.run_id)
    assert parent.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(found.run_id)}
    assert {"sweep.json", "sweep.html", "sweep"} <= files
    page = (Path(found.folder) / "sweep.html").read_text()
    assert page.count("data:image/png;base64") >= 3
    assert "http" not in page, "it needs no other file"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.run_id}'"
    )
    assert len(children) == len(found.trials) + sum(len(c.values) for c in found.confirmed)
    assert all(child.info.status != "RUNNING" for child in children)
    by_name = {child.info.run_name: child for child in children}
    for trial in found.trials:
        child = by_name[trial.name]
        assert child.data.tags["sweep.status"] == trial.status
        assert float(child.data.params["optim.lr"]) == trial.point["optim.lr"]
        history = client.get_metric_history(child.info.run_id, "val/mean_recall")
        assert {p.step * BATCH: p.value for p in history}.items() >= dict(trial.measured).items()


@pytest.mark.cluster
@pytest.mark.slow
def test_the_answer_is_of_fresh_seeds_and_names_its_command(found: SweepResult) -> None:
    own = [one for one in found.confirmed if one.gain is None]
    assert [one.point for one in own] == [{"objective.alpha": 0.4, "optim.lr": 2e-3}]
    for one in found.confirmed:
        assert len(one.values) == 1
        if one.gain is not None:
            assert one.gain.low <= one.gain.value <= one.gain.high
            assert one.gain.value == pytest.approx(one.values[0] - own[0].values[0])
    assert found.command.startswith("python jobs/pretrain.py tiny --corpus ")
    assert f"--alpha {found.best['objective.alpha']}" in found.command or not found.is_proven
    assert answer(found)
    assert sweep_table(found).row_count == len(found.trials)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_same_name_goes_on_and_trains_nothing_twice(
    found: SweepResult,
    small_corpus: SmallCorpus,
    val: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.tracking_uri)
    records = {file: file.stat().st_mtime_ns for file in Path(found.folder).glob("*/*/trial.json")}
    config = small_sweep(small_corpus.folder, val, root, trials=5, bootstrap=60)

    again = sweep(config, preset="tiny", start=tiny())

    assert again.run_id == found.run_id
    assert json.dumps([t.measured for t in again.trials]) == json.dumps(
        [t.measured for t in found.trials]
    )
    assert {file: file.stat().st_mtime_ns for file in records} == records
    other = dataclasses.replace(config, axes=("objective.alpha=0.1,0.9",))
    with pytest.raises(InputError, match=r"holds a sweep with other values of axes\. "):
        sweep(other, preset="tiny", start=tiny())


def test_a_sweep_without_held_out_pictures_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(small_sweep(tmp_path, tmp_path, tmp_path), val=None)
    with pytest.raises(InputError, match="--val is missing: trials are compared by their recall"):
        sweep(config, preset="tiny", start=tiny())


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "scheduler", "workers"), [("random", "pbt", 0), ("model", "none", 1)]
)
def test_trials_may_go_on_from_better_ones_and_a_model_may_propose_settings(
    local_ray: None,
    small_corpus: SmallCorpus,
    val: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    search: Literal["random", "model"],
    scheduler: Literal["pbt", "none"],
    workers: int,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    config = small_sweep(small_corpus.folder, val, root, name=search, trials=2, steps=4)
    config = dataclasses.replace(
        config,
        axes=("objective.alpha=0:1",),
        search=search,
        scheduler=scheduler,
        workers=workers,
        confirm_seeds=0,
    )

    found = sweep(config, preset="tiny", start=tiny())

    assert [trial.status for trial in found.trials] == ["finished"] * 2
    assert all(t.measured[-1][0] == 4 * BATCH for t in found.trials)
    if scheduler == "none":  # PBT moves trials to other places, and their settings with them
        assert all(t.measured[0][0] == 2 * BATCH for t in found.trials)
        alphas = {trial.point["objective.alpha"] for trial in found.trials}
        assert 0.4 in alphas, "the preset's own"
        assert len(alphas) == 2
