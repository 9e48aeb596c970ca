"""Pre-training from the driver's side: the start, the MLflow run, Ray Train, the model."""

import dataclasses
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from albef_core.config import format_recipe
from albef_core.errors import InputError, Preempted
from pipelines.checkpoint_store import CheckpointStore, Found
from pipelines.cluster import connect
from pipelines.config import PretrainConfig
from pipelines.config_file import write_config
from pipelines.manifest import check_captioned, read_manifest
from pipelines.model_store import StoredModel, log_model
from pipelines.order import steps_per_epoch
from pipelines.progress import ProgressBoard, run_with_progress
from pipelines.resume import (
    CONFIG_FILE,
    CORPUS_FILE,
    TRAINING_FILES,
    adopt,
    check_same,
    name_run,
    open_store,
)
from pipelines.start import prepare_start, use_gpu
from pipelines.tracking import RunHandle, Tracker, open_run
from pipelines.train_loop import TrainJob, train_loop

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where a finished pre-training left what it made."""

    run_dir: Path
    model: Path
    """Model folder: what jobs/evaluate.py takes."""
    handle: RunHandle
    stored: StoredModel
    """The same model in MLflow."""
    num_steps: int
    corpus_id: str


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pre-train as the config says; a second call with the same name goes on where it was.

    Raises:
        InputError: corpus, tokenizer, starting weights, resources or an earlier run do not fit the
            config.
        Preempted: the training was asked to stop, and left a checkpoint.
    """
    # Ray Train gives its workers another folder: relative names would mean nothing there.
    config = dataclasses.replace(
        config, corpus=config.corpus.absolute(), storage=config.storage.absolute()
    )
    check_captioned(manifest := read_manifest(config.corpus))
    epoch_steps = steps_per_epoch(manifest.num_images, config.batch_size)
    connect()
    on_gpu = use_gpu(config)
    config = name_run(config)
    run_dir, store = config.storage / config.name, open_store(config)
    check_same(config, run_dir, manifest.content_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    adopt(config, store, run_dir, manifest.content_id)
    asked, (config, weights_tags) = config, prepare_start(config, manifest, run_dir / "start")
    write_config(asked, run_dir / CONFIG_FILE)
    (run_dir / CORPUS_FILE).write_text(manifest.content_id)
    handle = open_run(
        config.experiment,
        run_dir,
        run_name=config.name,
        params=config,
        tags={
            "corpus.id": manifest.content_id,
            "recipe": format_recipe(config.recipe),
            "seed": str(config.seed),
            "world_size": str(config.workers),
            "device": "cuda" if on_gpu else "cpu",
            **weights_tags,
        },
    )
    tracker = Tracker(handle)
    try:
        tracker.log_artifact(run_dir / CONFIG_FILE, CONFIG_FILE)
        job = TrainJob(
            config=config,
            start=run_dir / "start",
            corpus_id=manifest.content_id,
            num_steps=config.steps or (config.epochs or 0) * epoch_steps,
            steps_per_epoch=epoch_steps,
            handle=handle,
            board=ProgressBoard.remote(),
        )
        _fit(job, on_gpu=on_gpu)
        model = _finished_model(_last_checkpoint(job, store), run_dir / "model")
        tags = {"corpus.id": manifest.content_id, "seed": str(config.seed)}
        stored = log_model(handle, model, register=config.register, tags=tags)
    except BaseException as error:
        was_stopped = isinstance(error, KeyboardInterrupt | Preempted)
        tracker.finish("KILLED" if was_stopped else "FAILED")
        raise
    tracker.finish()
    return PretrainResult(
        run_dir=run_dir,
        model=model,
        handle=handle,
        stored=stored,
        num_steps=job.num_steps,
        corpus_id=manifest.content_id,
    )


def _fit(job: TrainJob, *, on_gpu: bool) -> None:
    """Run Ray Train until the workers have done the last step, or have stopped."""
    config = job.config
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a loss is noticed
    # How long a smaller group is waited for when some workers do not come back.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    num_workers = (config.min_workers, config.workers) if config.min_workers else config.workers
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": config.worker_cpus} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.storage),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
    )
    title = f"pre-training {config.name}"
    try:
        run_with_progress(trainer.fit, job.board, title=title, total=job.num_steps)
    except TrainingFailedError:
        _raise_refusal(job.board)
        raise
    _raise_refusal(job.board)


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


def _finished_model(newest: Found, folder: Path) -> Path:
    """Copy the student out of the last checkpoint: a model folder without teacher and optimizer."""
    folder.mkdir(exist_ok=True)
    with newest.fetch() as source:
        for file in source.iterdir():
            if file.name not in TRAINING_FILES:
                shutil.copyfile(file, folder / file.name)
    return folder
