"""A sweep from the driver's side: Ray Tune over pre-trainings, their comparison, the answer."""

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from albef_core.errors import InputError, Preempted
from albef_core.paired import Difference, paired_bootstrap
from pipelines.cluster import connect
from pipelines.config import PretrainConfig
from pipelines.config_file import read_config, write_config
from pipelines.manifest import check_captioned, read_manifest
from pipelines.order import steps_per_epoch
from pipelines.resources import use_gpu, worker_resources
from pipelines.resume import CONFIG_FILE
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_report import log_report
from pipelines.sweep_result import Confirmed, SweepResult, TrialResult, format_point, ranked
from pipelines.sweep_space import Axis, Point, axes_of, flags_of, points_of, value_of, with_point
from pipelines.sweep_trial import CURVE, METRIC, RECORD_FILE, RUNG, TrialPlan, run_trial
from pipelines.tracking import RunHandle, Tracker, flatten, open_run, settle_run
from pipelines.train import collect_held_out, with_absolute_names
from pipelines.validation import ROWS_FILE

logger = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"
TRIAL_CPUS = 0.1
"""CPUs of a trial that only waits for its train workers."""
SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Default milestones, as shares of a trial."""
NUM_CONFIRMED = 2
SEED = "seed"
MAY_CHANGE = frozenset({"at_once", "confirm_seeds", "bootstrap", "max_failures", "resume", "force"})
"""Fields that a sweep may change when it goes on."""


def sweep(config: SweepConfig, *, preset: str, start: PretrainConfig) -> SweepResult:
    """Search, confirm, report; a second call with the same name goes on where it was.

    Args:
        config: what to search.
        preset: name of the preset that the command starts from, for the command in the answer.
        start: that preset, which the command's flags are differences from.

    Raises:
        InputError: corpus, held-out pictures, axes, resources or an earlier sweep do not fit.
        Preempted: the sweep was asked to stop, and goes on with the same command.
    """
    config = _named(with_absolute_names(config))
    if config.val is None:
        raise InputError(
            "--val is missing: trials are compared by their recall on held-out pictures. Give a"
            " corpus that --corpus does not hold."
        )
    check_captioned(manifest := read_manifest(config.corpus))
    collect_held_out(config, "retrieval", manifest)
    axes = axes_of(config)
    default = {axis.name: value_of(config, axis.name) for axis in axes}
    folder = config.storage / config.name
    _check_same(config, folder)
    marks = milestones_of(config, manifest.num_images)
    points = _points(config, axes, default)
    for point in points or [default]:
        with_point(config, point)  # refuses what the config does not allow
    # Tune would keep a log of its own of each trial, in three formats.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A trial that fails before its first milestone has nothing to compare, and ends no sweep.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    connect(dashboard=config.workers > 0)
    on_gpu = use_gpu(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / CONFIG_FILE)
    handle = open_run(
        config.experiment,
        folder,
        run_name=config.name,
        params=config,
        tags={"corpus.id": manifest.content_id, "seed": str(config.seed)},
    )
    tracker = Tracker(handle)
    try:
        plan = TrialPlan(config=config, folder=folder / "trials", marks=marks, parent=handle)
        stage = Stage(plan, folder / "tune" / "search", at_once=at_once(config, on_gpu=on_gpu))
        trials = stage.search(axes, points, default, on_gpu=on_gpu)
        confirmed = _confirm(config, trials, default, plan, folder, on_gpu=on_gpu)
        result = _answer(config, trials, confirmed, default, axes, marks, handle, preset, start)
        (folder / SWEEP_FILE).write_text(json.dumps(asdict(result), indent=1) + "\n")
        tracker.log_artifact(folder / SWEEP_FILE, SWEEP_FILE)
        log_report(tracker, result, folder)
    except BaseException as error:
        was_stopped = isinstance(error, KeyboardInterrupt | Preempted)
        tracker.finish("KILLED" if was_stopped else "FAILED")
        raise
    tracker.finish()
    return result


def milestones_of(config: SweepConfig, num_images: int) -> tuple[int, ...]:
    """Give the pairs seen at which trials are compared; the last is the end of a trial.

    Raises:
        InputError: a milestone lies behind the end.
    """
    per_epoch = steps_per_epoch(num_images, config.batch_size)
    steps = config.steps or (config.epochs or 0) * per_epoch
    end = steps * config.batch_size
    marks = sorted(config.milestones or {round(share * end) for share in SHARES})
    if marks[-1] >= end:
        raise InputError(
            f"--milestones {marks[-1]}: a trial ends after {end} pairs. Take earlier ones, or more"
            " --steps."
        )
    return (*(mark for mark in marks if mark > 0), end)


def at_once(config: SweepConfig, *, on_gpu: bool) -> int:
    """Count the trials that fit on the cluster: more would wait for each other for ever."""
    have, each = ray.cluster_resources(), config.num_processes
    needed = each * config.worker_cpus + config.feed_cpus + (TRIAL_CPUS if config.workers else 0)
    room = int(have.get("CPU", 0) / needed + 1e-9)
    if on_gpu:
        room = min(room, int(have.get("GPU", 0) / (each * config.gpus_per_worker)))
    return max(1, min(room, config.at_once or room))


class Stage:
    """A set of trials under Tune: the search, or its confirmation. Goes on where it was."""

    def __init__(self, plan: TrialPlan, experiment: Path, *, at_once: int) -> None:
        self._plan, self._experiment, self._at_once = plan, experiment, at_once

    def search(
        self, axes: Sequence[Axis], points: list[Point], default: Point, *, on_gpu: bool
    ) -> list[TrialResult]:
        """Try the points, or what a model chooses where there are none."""
        config = self._plan.config
        space = {axis.name: _domain(axis) for axis in axes}
        search: SearchAlgorithm | Searcher = (
            BasicVariantGenerator(points_to_evaluate=points, max_concurrent=self._at_once)
            if points
            else _model_search(space, default, seed=config.seed)
        )
        num = len(points) or config.trials
        scheduler = _scheduler(self._plan, space)
        # A model brings its space along, and Tune refuses to be told of it twice.
        own = space if points else {}
        return self._run(own, search, scheduler, num, default, on_gpu=on_gpu)

    def repeat(self, points: list[Point], default: Point, *, on_gpu: bool) -> list[TrialResult]:
        """Train points to their end."""
        # Every point is given: the space only names what they have.
        space = {name: tune.choice([None]) for name in points[0]}
        search = BasicVariantGenerator(points_to_evaluate=points, max_concurrent=self._at_once)
        return self._run(space, search, FIFOScheduler(), len(points), default, on_gpu=on_gpu)

    def _run(
        self,
        space: dict[str, Any],
        search: SearchAlgorithm | Searcher,
        scheduler: TrialScheduler,
        num: int,
        default: Point,
        *,
        on_gpu: bool,
    ) -> list[TrialResult]:
        plan = self._plan

        def trial(point: Point) -> None:
            run_trial(point, plan)

        trainable = tune.with_resources(trial, _trial_resources(plan.config, on_gpu=on_gpu))
        path = str(self._experiment)
        if tune.Tuner.can_restore(path):
            logger.info("%s is there already: this sweep goes on", path)
            tuner = tune.Tuner.restore(path, trainable, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    search_alg=search,
                    scheduler=scheduler,
                    num_samples=num,
                    max_concurrent_trials=self._at_once,
                    reuse_actors=True,  # starting one costs as much as a short trial
                ),
                run_config=tune.RunConfig(
                    name=self._experiment.name,
                    storage_path=str(self._experiment.parent),
                    failure_config=tune.FailureConfig(max_failures=plan.config.max_failures),
                    callbacks=[Narrator(num)],
                    verbose=0,
                ),
            )
        again = "The same command goes on with it."
        try:
            grid = tuner.fit()
        except SystemExit:  # Ray's answer to SIGTERM
            raise Preempted(f"Stopped during {path}, as asked. {again}") from None
        trials = grid._experiment_analysis.trials or []  # pyright: ignore[reportPrivateUsage]  # a Result does not know its trial's id
        if open_trials := [t for t in trials if not t.is_finished()]:
            raise Preempted(f"Stopped with {len(open_trials)} trials open in {path}. {again}")
        results = [_result_of(plan, trial, default) for trial in trials]
        return sorted(results, key=lambda result: result.name)


class Narrator(tune.Callback):
    """Says in the log what becomes of each trial."""

    def __init__(self, num: int) -> None:
        self._num, self._ended = num, 0

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Name a trial that begins, or goes on after a kill."""
        logger.info("trial %s: %s", trial.trial_id, format_point(trial.config))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Say what was measured."""
        if METRIC in result:
            logger.info(
                "trial %s: mean recall %.1f %% after %s pairs",
                trial.trial_id,
                100 * result[METRIC],
                f"{result['pairs']:,}",
            )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Count the trials that have come to an end."""
        self._ended += 1
        logger.info("trial %s has ended: %d of %d", trial.trial_id, self._ended, self._num)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Name a trial that died; Tune starts it again while it may."""
        logger.warning("trial %s died: %s", trial.trial_id, _last_line(trial.get_error()))


def _points(config: SweepConfig, axes: list[Axis], default: Point) -> list[Point]:
    if config.search == "model":
        return []
    return points_of(axes, default, num=config.trials, search=config.search, seed=config.seed)


def _domain(axis: Axis) -> Any:
    if axis.choices:
        return tune.choice(list(axis.choices))
    if axis.is_whole:
        whole = tune.lograndint if axis.is_log else tune.randint
        return whole(int(axis.low), int(axis.high) + 1)
    return (tune.loguniform if axis.is_log else tune.uniform)(axis.low, axis.high)


def _model_search(space: dict[str, Any], default: Point, *, seed: int) -> Searcher:
    return OptunaSearch(space, metric=METRIC, mode="max", points_to_evaluate=[default], seed=seed)


def _scheduler(plan: TrialPlan, space: dict[str, Any]) -> TrialScheduler:
    config = plan.config
    if config.scheduler == "none":
        return FIFOScheduler()
    if config.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=RUNG, perturbation_interval=1, hyperparam_mutations=space
        )
    return ASHAScheduler(
        time_attr=RUNG,
        max_t=config.reduction ** (len(plan.marks) - 1),
        grace_period=1,
        reduction_factor=config.reduction,
    )


def _trial_resources(config: SweepConfig, *, on_gpu: bool) -> dict[str, float]:
    if config.workers:
        return {"CPU": TRIAL_CPUS}
    return worker_resources(config, on_gpu=on_gpu)


def _result_of(plan: TrialPlan, trial: Trial, default: Point) -> TrialResult:
    """Read a trial's own account, and bring its MLflow run to an end where Tune ended the trial."""
    run_dir = plan.folder / trial.trial_id
    file = run_dir / RECORD_FILE
    body = json.loads(file.read_text()) if file.is_file() else {"measured": [], "failure": ""}
    point, measured = body.get("point", trial.config), [(n, v) for n, v in body["measured"]]
    if body["failure"]:
        status, reason = "failed", body["failure"]
    elif trial.status == Trial.ERROR:
        status, reason = "died", _last_line(trial.get_error())
    else:
        status, reason = ("finished" if body.get("is_done") else "stopped"), ""
    handle = RunHandle.of(run_dir) if run_dir.is_dir() else None
    if handle is not None:
        batch_size = with_point(plan.config, point).batch_size
        settle_run(
            handle,
            status="FINISHED" if status in ("finished", "stopped") else "FAILED",
            tags={"sweep.status": status, "sweep.reason": reason},
            curves={CURVE: {pairs // batch_size: value for pairs, value in measured}},
        )
    shared = {name: value for name, value in point.items() if name != SEED or SEED in default}
    return TrialResult(
        name=trial.trial_id,
        point=point,
        measured=measured,
        status=status,
        reason=reason,
        is_default=shared == default,
    )


def _last_line(error: BaseException | None) -> str:
    lines = str(error or "").strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"


def _confirm(
    config: SweepConfig,
    trials: Sequence[TrialResult],
    default: Point,
    plan: TrialPlan,
    folder: Path,
    *,
    on_gpu: bool,
) -> list[Confirmed]:
    """Train the best settings and the preset's own again, with seeds that chose nothing."""
    if not config.confirm_seeds or SEED in default:
        return []
    best = [trial.point for trial in ranked(trials) if not trial.is_default][:NUM_CONFIRMED]
    seeds = range(config.seed + 1, config.seed + 1 + config.confirm_seeds)
    to_the_end = dataclasses.replace(config, scheduler="none")
    again = dataclasses.replace(plan, folder=folder / "confirm", config=to_the_end)
    results: dict[str, TrialResult] = {}
    for seed in seeds:  # a stage each, so that the same name may go on with more of them
        points = [{**point, SEED: seed} for point in [default, *best]]
        state = folder / "tune" / f"confirm-{seed}"
        stage = Stage(again, state, at_once=at_once(config, on_gpu=on_gpu))
        repeated = stage.repeat(points, default, on_gpu=on_gpu)
        results |= {json.dumps(trial.point): trial for trial in repeated}
    rows, values = {}, {}
    for number, point in enumerate([default, *best]):
        runs = [results.get(json.dumps({**point, SEED: seed})) for seed in seeds]
        whole = [run for run in runs if run is not None and run.status == "finished"]
        values[number] = [run.value for run in whole if run.value is not None]
        rows[number] = [np.load(again.folder / run.name / ROWS_FILE) for run in whole]
    confirmed = [Confirmed(point=default, values=values[0], gain=None)]
    for number, point in enumerate(best, start=1):
        gain = _gain(config, rows[number], rows[0])
        confirmed.append(Confirmed(point=point, values=values[number], gain=gain))
    return sorted(confirmed, key=lambda one: -float(np.mean(one.values or [-1.0])))


def _gain(config: SweepConfig, ours: list[Any], theirs: list[Any]) -> Difference | None:
    """Compare two settings on the same queries, each by the mean over its seeds."""
    if not ours or not theirs:
        return None
    return paired_bootstrap(
        np.mean([run["scores"] for run in ours], axis=0),
        np.mean([run["scores"] for run in theirs], axis=0),
        theirs[0]["pictures"],
        parts=theirs[0]["parts"],
        num_resamples=config.bootstrap,
        seed=config.seed,
    )


def _answer(
    config: SweepConfig,
    trials: list[TrialResult],
    confirmed: list[Confirmed],
    default: Point,
    axes: list[Axis],
    marks: tuple[int, ...],
    handle: RunHandle,
    preset: str,
    start: PretrainConfig,
) -> SweepResult:
    first = confirmed[0] if confirmed else None
    is_proven = first is not None and first.gain is not None and first.gain.low > 0
    best = first.point if is_proven and first is not None else default
    alone = dataclasses.replace(
        config.pretraining(),
        name="",
        workers=start.workers,
        register=start.register,
        experiment=start.experiment,
    )
    chosen = with_point(alone, best)
    flags = flags_of(chosen, dataclasses.replace(start, name=""))
    return SweepResult(
        name=config.name,
        folder=str(config.storage / config.name),
        axes=axes,
        trials=trials,
        confirmed=confirmed,
        best=best,
        is_proven=is_proven,
        command=shlex.join(["python", "jobs/pretrain.py", preset, *flags]),
        num_pairs=sum(trial.pairs for trial in trials)
        + sum(len(one.values) for one in confirmed) * marks[-1],
        milestones=list(marks),
        tracking_uri=handle.uri,
        run_id=handle.run_id,
    )


def _named(config: SweepConfig) -> SweepConfig:
    """Find the sweep that `--resume` goes on with, where no `--name` says so."""
    if config.name:
        return config
    if config.resume != "newest":
        folder = Path(config.resume).absolute()
        return dataclasses.replace(config, name=folder.name, storage=folder.parent)
    begun = sorted(config.storage.glob("*/tune"), key=lambda state: state.stat().st_mtime)
    if not begun:
        raise InputError(f"--resume: {config.storage} holds no sweep. Check --storage, or begin.")
    return dataclasses.replace(config, name=begun[-1].parent.name)


def _check_same(config: SweepConfig, folder: Path) -> None:
    if not (folder / CONFIG_FILE).is_file():
        return
    before = flatten(read_config(folder / CONFIG_FILE, SweepConfig))
    now = flatten(config)
    other = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
    if other:
        raise InputError(
            f"--name {config.name}: {folder} holds a sweep with other values of {', '.join(other)}."
            " Give the same flags to go on with it, or another --name."
        )
