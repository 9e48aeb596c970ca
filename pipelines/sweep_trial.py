"""One trial of a sweep: a pre-training of its own, which tells Ray Tune what it measures."""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from albef_core.errors import InputError, Preempted
from pipelines.checkpoint_store import open_store
from pipelines.config import PretrainConfig
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_space import Point, with_point
from pipelines.tracking import RunHandle
from pipelines.train import pretrain

RECORD_FILE = "trial.json"
POINTER_FILE = "checkpoint"
"""All that a checkpoint has as Tune knows it: the address of ours."""
METRIC, RUNG = "mean_recall", "rung"
CURVE = f"val/{METRIC}"
CHECKPOINT_TIMEOUT_S = 300.0
KEEP_ALL = 1_000_000
"""Checkpoints of a trial that others go on from: none is removed."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What the trials of one stage share."""

    config: SweepConfig
    folder: Path
    """Where trials have their runs."""
    marks: tuple[int, ...]
    """Pairs seen at which a trial is compared; the last one is its end."""
    parent: RunHandle
    """MLflow run of the sweep."""

    @property
    def keeps_checkpoints(self) -> bool:
        """Tell whether one trial may go on from another."""
        return self.config.scheduler == "pbt"

    def rung(self, pairs: int, batch_size: int) -> float | None:
        """Give what Tune's schedulers count in; None: nothing is compared after so many pairs.

        PBT counts the milestones. ASHA compares at powers of the reduction factor, so the n-th
        milestone is the n-th power. The end lies between two of them: a scheduler that ended a
        trial there would end it before its model is kept.
        """
        last = len(self.marks) - 1
        for number, mark in enumerate(self.marks):
            if 0 <= pairs - mark < batch_size:
                compared = min(number, last - 1)
                count = 1 + compared if self.keeps_checkpoints else self.config.reduction**compared
                return count + (0.5 if number == last else 0.0)
        return None


def trial_config(plan: TrialPlan, point: Point, name: str) -> PretrainConfig:
    """Give the config of the pre-training at a point.

    Raises:
        InputError: the config does not allow the point.
    """
    config = replace(
        plan.config.pretraining(),
        storage=plan.folder,
        name=name,
        register="",
        resume="",
        # What is compared is what a trial has come to, not the best of several looks at it.
        keep_best="",
        keep_last=KEEP_ALL if plan.keeps_checkpoints else plan.config.keep_last,
        val_at=plan.marks[:-1],
    )
    return with_point(config, point)


def run_trial(point: Point, plan: TrialPlan) -> None:
    """Train at a point, inside a Tune trial; after a kill the same trial goes on where it was.

    A mistake, such as a rate that ruins the weights, is noted and ends the trial, not the sweep.
    """
    name = tune.get_context().get_trial_id()
    assert name is not None
    # A trial's process has the environment of its node, and not that of the sweep's command.
    os.environ["MLFLOW_TRACKING_URI"] = plan.parent.uri
    record = Record(plan.folder / name, point)
    try:
        config = trial_config(plan, point, name)
        if plan.keeps_checkpoints and (donor := _donor()):
            config = replace(config, resume=donor, force=True)

        def on_measured(step: int, values: Mapping[str, float]) -> None:
            pairs = step * config.batch_size
            rung = plan.rung(pairs, config.batch_size)
            if rung is None:
                return
            record.add(pairs, values[CURVE])
            said = {RUNG: rung, METRIC: values[CURVE], "pairs": pairs}
            if pairs < plan.marks[-1]:
                _report(plan, config, step, said)
            else:
                at_the_end.append((step, said))

        at_the_end: list[tuple[int, dict[str, float]]] = []
        tags = {"mlflow.parentRunId": plan.parent.run_id}
        pretrain(config, on_measured=on_measured, tags=tags)
    except Preempted:
        return  # the sweep was stopped, and goes on with the same command
    except InputError as error:
        record.close(str(error))
        return
    record.close("")
    for step, said in at_the_end:  # not before the model is kept: Tune may end this process
        _report(plan, config, step, said)


class Record:
    """What a trial has measured, in its run's folder: the sweep's own account, whoever dies."""

    def __init__(self, run_dir: Path, point: Point) -> None:
        self._file = run_dir / RECORD_FILE
        self.body: dict[str, Any] = {
            "point": point,
            "measured": [],
            "is_done": False,
            "failure": "",
        }
        if self._file.is_file():
            self.body = json.loads(self._file.read_text()) | {"point": point}

    def add(self, pairs: int, value: float) -> None:
        """Note a measurement; a trial that repeats steps after a kill notes it once."""
        earlier = [one for one in self.body["measured"] if one[0] < pairs]
        self.body["measured"] = [*earlier, [pairs, value]]
        self._write()

    def close(self, failure: str) -> None:
        """Note that the trial has come to its end, or why it could not."""
        self.body |= {"is_done": True, "failure": failure}
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(self.body))
        partial.replace(self._file)


def _report(plan: TrialPlan, config: PretrainConfig, step: int, values: dict[str, float]) -> None:
    """Tell Tune, which may answer by ending this thread; where trials trade, with a checkpoint."""
    if not plan.keeps_checkpoints:
        tune.report(values)
        return
    store, deadline = open_store(config), time.monotonic() + CHECKPOINT_TIMEOUT_S
    while (found := store.newest_good()) is None or found.progress.step < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{store.location}: no checkpoint of step {step} came")
        time.sleep(0.2)
    with tempfile.TemporaryDirectory(prefix="albef-trial-") as folder:
        (Path(folder) / POINTER_FILE).write_text(found.url)
        tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))


def _donor() -> str:
    """Find the checkpoint that Tune tells this trial to go on from; "" where there is none."""
    given = tune.get_checkpoint()
    if given is None:
        return ""
    with given.as_directory() as folder:
        return (Path(folder) / POINTER_FILE).read_text()
