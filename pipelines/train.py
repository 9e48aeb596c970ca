"""A training from the driver's side: the start, the MLflow run, Ray Train, the model."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from albef_core.config import format_recipe
from albef_core.errors import InputError, Preempted
from pipelines.checkpoint_files import FileMark
from pipelines.checkpoint_store import CheckpointStore, Found, open_store
from pipelines.cluster import connect
from pipelines.config import PretrainConfig, TaskName, TrainConfig
from pipelines.config_file import config_values, write_config
from pipelines.examples import VAL_FILE, Collected, collect_examples, write_examples
from pipelines.leaks import find_leaks
from pipelines.manifest import Manifest, check_captioned, read_manifest
from pipelines.model_card import CorpusSummary, Provenance, environment
from pipelines.model_store import StoredModel, log_checkpoint, log_model
from pipelines.order import steps_per_epoch
from pipelines.pretraining_task import PretrainingTask
from pipelines.progress import OnMeasured, open_board, run_with_progress
from pipelines.resizing import SaveBeforeResizing
from pipelines.resources import scaling_config, use_gpu, use_own_gpu
from pipelines.resume import (
    CONFIG_FILE,
    CORPUS_FILE,
    TRAINING_FILES,
    adopt,
    check_same,
    name_run,
)
from pipelines.start import prepare_start
from pipelines.task import Task
from pipelines.tracking import RunHandle, Tracker, git_commit, open_run
from pipelines.train_loop import TrainJob, train_loop

logger = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished training left what it made."""

    run_dir: Path
    model: Path
    """Model folder: what jobs/evaluate.py takes."""
    handle: RunHandle
    stored: StoredModel
    """The same model in MLflow."""
    num_steps: int
    corpus_id: str


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one kind of training brings to `train`: everything before the workers start."""

    task: Callable[[Any, Path, torch.device], Task]
    """Makes a worker's task of config, start folder and device."""
    corpus_id: str
    """Identity of what is learned from."""
    num_items: int
    """Items of an epoch."""
    prepare: Callable[[Any, Path], tuple[Any, dict[str, str]]]
    """Writes the model that training starts from into a folder; gives the config with the sizes
    that it has, and tags of the run."""
    held_out: Collected | None = None
    """What the student is asked between epochs."""


def pretrain(
    config: PretrainConfig,
    *,
    on_measured: OnMeasured = lambda step, values: None,
    tags: Mapping[str, str] | None = None,
) -> TrainResult:
    """Pre-train as the config says; a second call with the same name goes on where it was.

    `on_measured` hears the curves `val/...` of `--val` as they come; the run gets `tags` too.

    Raises:
        InputError: corpus, tokenizer, starting weights, resources or an earlier run do not fit the
            config.
        Preempted: the training was asked to stop, and left a checkpoint.
    """
    config = with_absolute_names(config)
    check_captioned(manifest := read_manifest(config.corpus))
    held_out = collect_held_out(config, "retrieval", manifest)
    course = Course(
        task=PretrainingTask,
        corpus_id=manifest.content_id,
        num_items=manifest.num_images,
        prepare=lambda config, folder: prepare_start(config, manifest, folder),
        held_out=held_out,
    )
    if ingested_by := manifest.settings.get("run_id"):
        tags = {"corpus.run": str(ingested_by), **(tags or {})}
    return train(config, course, on_measured=on_measured, tags=tags)


def collect_held_out(config: TrainConfig, task: TaskName, learned: Manifest) -> Collected | None:
    """Find the examples of `--val`; None where it is not given.

    Raises:
        InputError: it has none, or is the corpus that is learned from.
    """
    if config.val is None:
        return None
    manifest = read_manifest(config.val)
    if manifest.content_id == learned.content_id:
        raise InputError(f"--val {config.val}: is what --corpus holds. Give pictures held out.")
    return collect_examples(manifest, task)


def with_absolute_names(config: Config) -> Config:
    """Make the folders of a config absolute: Ray Train gives its workers another one."""
    return dataclasses.replace(
        config,
        corpus=config.corpus.absolute(),
        val=config.val.absolute() if config.val else None,
        storage=config.storage.absolute(),
    )


def train(
    config: TrainConfig,
    course: Course,
    *,
    on_measured: OnMeasured = lambda step, values: None,
    tags: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train on the cluster, as one MLflow run; a second call with the same name goes on.

    Raises:
        InputError: something given does not fit the config.
        Preempted: the training was asked to stop, and left a checkpoint.
    """
    epoch_steps = steps_per_epoch(course.num_items, config.batch_size)
    connect()
    on_gpu = use_gpu(config) if config.workers else use_own_gpu(config)
    config = name_run(config)
    run_dir, store = config.storage / config.name, open_store(config)
    check_same(config, run_dir, course.corpus_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    adopt(config, store, run_dir, course.corpus_id)
    asked, (config, weights_tags) = config, course.prepare(config, run_dir / "start")
    if course.held_out:
        write_examples(course.held_out, run_dir / "start" / VAL_FILE)
    write_config(asked, run_dir / CONFIG_FILE)
    (run_dir / CORPUS_FILE).write_text(course.corpus_id)
    handle = open_run(
        config.experiment,
        run_dir,
        run_name=config.name,
        params=config,
        tags={
            "corpus.id": course.corpus_id,
            "recipe": format_recipe(config.recipe),
            "seed": str(config.seed),
            "world_size": str(config.num_processes),
            "device": "cuda" if on_gpu else "cpu",
            **weights_tags,
            **(tags or {}),
        },
    )
    tracker = Tracker(handle)
    board = open_board()
    try:
        tracker.log_artifact(run_dir / CONFIG_FILE, CONFIG_FILE)
        job = TrainJob(
            config=config,
            task=course.task,
            start=run_dir / "start",
            corpus_id=course.corpus_id,
            num_steps=config.steps or (config.epochs or 0) * epoch_steps,
            steps_per_epoch=epoch_steps,
            tracking_uri=handle.uri,
            run_id=handle.run_id,
            board=board,
            on_gpu=on_gpu,
        )
        _fit(job, on_measured=on_measured)
        last = _last_checkpoint(job, store)
        finished = (store.best() if config.val else None) or last
        model, state = _finished_model(finished, run_dir / "model", config, handle)
        told = {"corpus.id": course.corpus_id, "seed": str(config.seed)}
        device = "cuda" if on_gpu else "cpu"
        provenance = _provenance(config, finished, state, environment(device))
        stored = log_model(
            handle, model, provenance=provenance, register=config.register, tags=told
        )
    except BaseException as error:
        was_stopped = isinstance(error, KeyboardInterrupt | Preempted | SystemExit)
        tracker.finish("KILLED" if was_stopped else "FAILED")
        raise
    finally:
        ray.kill(board)  # Ray keeps an actor for good that travels inside the pickled job
    tracker.finish()
    return TrainResult(
        run_dir=run_dir,
        model=model,
        handle=handle,
        stored=stored,
        num_steps=job.num_steps,
        corpus_id=course.corpus_id,
    )


def _fit(job: TrainJob, *, on_measured: OnMeasured) -> None:
    """Train until the last step is done, or until all have stopped: by workers, or alone."""
    # As bytes: Ray's controller would import torch and MLflow only to hand it on.
    settings = {"job": cloudpickle.dumps(job)}  # pyright: ignore[reportPrivateImportUsage]  # Ray documents it
    work = partial(train_loop, settings) if not job.config.workers else _trainer(job, settings).fit
    title = f"training {job.config.name}"
    try:
        run_with_progress(
            work, job.board, title=title, total=job.num_steps, on_measured=on_measured
        )
    except TrainingFailedError:
        _raise_refusal(job.board)
        raise
    _raise_refusal(job.board)


def _trainer(job: TrainJob, settings: dict[str, bytes]) -> TorchTrainer:
    config = job.config
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a loss is noticed
    # How long a smaller group is waited for when some workers do not come back; all of them may
    # wait for machines that an autoscaler still boots.
    wait_s = "30" if config.min_workers else "900"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", wait_s)
    return TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=scaling_config(config, on_gpu=job.on_gpu),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.storage),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[SaveBeforeResizing(job.board)],  # pyright: ignore[reportArgumentType]  # Ray takes its own kinds too
        ),
        torch_config=TorchConfig(backend="nccl" if job.on_gpu else "gloo"),
    )


def _raise_refusal(board: Any) -> None:
    if refusal := ray.get(board.read_refusal.remote()):
        raise InputError(refusal)


def _last_checkpoint(job: TrainJob, store: CheckpointStore) -> Found:
    newest = store.newest_good()
    if newest is None:
        raise InputError(
            f"{store.location}: no checkpoint can be read any more."
            " Copy one back, or start again under another --name."
        )
    step = newest.progress.step
    if step < job.num_steps:
        raise Preempted(
            f"Stopped after step {step} of {job.num_steps}, as asked; {newest.url} is good."
            f" The same command goes on from it, with --name {job.config.name}."
        )
    return newest


def _finished_model(
    found: Found, folder: Path, config: TrainConfig, handle: RunHandle
) -> tuple[Path, dict[str, FileMark]]:
    """Copy the student out of a checkpoint: a model folder without teacher and optimizer.

    Where the model is to be registered, all of the checkpoint goes into the MLflow run.

    Returns:
        The folder, and the marks of the checkpoint's files in MLflow.
    """
    folder.mkdir(exist_ok=True)
    with found.fetch() as source:
        for file in source.iterdir():
            if file.name not in TRAINING_FILES:
                shutil.copyfile(file, folder / file.name)
        if config.register and config.register_checkpoint:
            return folder, log_checkpoint(handle, source)
    return folder, {}


def _provenance(
    config: TrainConfig, found: Found, state: dict[str, FileMark], runs_on: dict[str, str]
) -> Provenance:
    learned = read_manifest(config.corpus)
    return Provenance(
        corpus=CorpusSummary.of(learned),
        recipe=format_recipe(config.recipe),
        seed=config.seed,
        config=config_values(config),
        git_commit=git_commit(),
        environment=runs_on,
        metrics=found.progress.metrics,
        leaks=find_leaks(learned, read_manifest(config.val)) if config.val else None,
        checkpoint=state,
    )
