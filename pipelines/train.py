"""Pre-training from the driver's side: the start, the MLflow run, Ray Train, the model."""

import dataclasses
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from albef_core.config import format_recipe
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tokenizer import Tokenizer
from albef_core.weights import (
    apply_weights,
    load_image_weights,
    load_model,
    load_text_weights,
    save_model,
)
from pipelines.cluster import connect
from pipelines.config import PretrainConfig
from pipelines.config_file import read_config, write_config
from pipelines.manifest import Manifest, read_captions, read_manifest
from pipelines.model_store import StoredModel, log_model
from pipelines.order import steps_per_epoch
from pipelines.progress import ProgressBoard, run_with_progress
from pipelines.tracking import RunHandle, Tracker, flatten, open_run
from pipelines.train_loop import TrainJob, train_loop

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
CORPUS_FILE = "corpus_id"
"""File in a run's folder with the content id of what it trains on."""
MAY_CHANGE = frozenset(
    {
        "steps",
        "epochs",
        "workers",
        "device",
        "corpus",
        "storage",
        "log_every",
        "feed_cpus",
        "worker_cpus",
        "max_bad_share",
        "experiment",
        "register",
    }
)
"""Fields that a run may go on with when they differ; the corpus's content may not."""


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
        InputError: corpus, tokenizer, starting weights or resources do not fit the config.
    """
    # Ray Train gives its workers another folder: relative names would mean nothing there.
    config = dataclasses.replace(
        config, corpus=config.corpus.absolute(), storage=config.storage.absolute()
    )
    manifest = read_manifest(config.corpus)
    epoch_steps = steps_per_epoch(manifest.num_images, config.batch_size)
    connect()
    use_gpu = _use_gpu(config)
    run_dir = config.storage / config.name
    _refuse_another(config, run_dir, manifest.content_id)
    run_dir.mkdir(parents=True, exist_ok=True)
    asked, (config, weights_tags) = config, _prepare_start(config, manifest, run_dir / "start")
    write_config(asked, run_dir / "config.json")
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
            "device": "cuda" if use_gpu else "cpu",
            **weights_tags,
        },
    )
    tracker = Tracker(handle)
    try:
        tracker.log_artifact(run_dir / "config.json", "config.json")
        job = TrainJob(
            config=config,
            start=run_dir / "start",
            corpus_id=manifest.content_id,
            num_steps=config.steps or (config.epochs or 0) * epoch_steps,
            steps_per_epoch=epoch_steps,
            handle=handle,
            board=ProgressBoard.remote(),
        )
        checkpoint = _fit(job, use_gpu=use_gpu)
        model = _finished_model(checkpoint, run_dir / "model")
        tags = {"corpus.id": manifest.content_id, "seed": str(config.seed)}
        stored = log_model(handle, model, register=config.register, tags=tags)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
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


def _fit(job: TrainJob, *, use_gpu: bool) -> Checkpoint:
    """Run Ray Train to the end and give the last checkpoint."""
    config = job.config
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a report counts
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.worker_cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(config.storage),
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )
    title = f"pre-training {config.name}"
    try:
        result = run_with_progress(trainer.fit, job.board, title=title, total=job.num_steps)
    except TrainingFailedError:
        _raise_refusal(job.board)
        raise
    _raise_refusal(job.board)
    assert result.checkpoint is not None, "every run ends with a checkpoint"
    return result.checkpoint


def _raise_refusal(board: Any) -> None:
    if refusal := ray.get(board.read_refusal.remote()):
        raise InputError(refusal)


def _refuse_another(config: PretrainConfig, run_dir: Path, corpus_id: str) -> None:
    """Let a name go on only as what it was: other data or objectives would mix two runs in one."""
    if not (run_dir / "config.json").is_file():
        return
    before = flatten(read_config(run_dir / "config.json", PretrainConfig))
    now = flatten(config)
    other = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
    if (run_dir / CORPUS_FILE).read_text() != corpus_id:
        other.append("corpus")
    if other:
        raise InputError(
            f"--name {config.name}: {run_dir} holds a run with other values of"
            f" {', '.join(other)}. Give another --name, or the same flags to go on with it."
        )


def _use_gpu(config: PretrainConfig) -> bool:
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = config.device == "cuda" or (config.device == "auto" and num_gpus > 0)
    if use_gpu and num_gpus < config.workers:
        raise InputError(
            f"--device {config.device} with --workers {config.workers}: the cluster has {num_gpus}"
            " GPUs. Take fewer workers, or --device cpu."
        )
    num_cpus = ray.cluster_resources().get("CPU", 0)
    if config.workers * config.worker_cpus + config.feed_cpus > num_cpus:
        raise InputError(
            f"--workers {config.workers} at --worker-cpus {config.worker_cpus} leave none of the"
            f" cluster's {num_cpus:g} CPUs for decoding. Take fewer workers or lower --worker-cpus."
        )
    return use_gpu


def _prepare_start(
    config: PretrainConfig, manifest: Manifest, folder: Path
) -> tuple[PretrainConfig, dict[str, str]]:
    """Write the model that training starts from, and say which weights it really has."""
    if (folder / "config.json").is_file():
        logger.info("%s is there already: this run goes on", folder.parent)
        start = load_model(folder)
        return dataclasses.replace(config, model=start.model_config), {}
    torch.manual_seed(config.seed)
    if config.init:
        start = load_model(config.init)
        if start.report.missing:
            raise InputError(
                f"--init {config.init}: has no {start.report.missing[0].split('.')[0]}, as"
                " fine-tuned models have none. Start from a pre-training checkpoint."
            )
        tokenizer = start.tokenizer
        sizes = dataclasses.replace(
            start.model_config, image_size=config.model.image_size, dropout=config.model.dropout
        )
        model = ALBEF(sizes)
        weights = dict(start.model.named_parameters())
        report = apply_weights(model, weights, source=config.init)
        reports = {"weights.image": report, "weights.text": report}
    else:
        tokenizer = _tokenizer(config, manifest)
        sizes = dataclasses.replace(
            config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size
        )
        model = ALBEF(sizes, temperature=config.objective.temperature)
        reports = {
            "weights.image": load_image_weights(model, config.image_weights),
            "weights.text": load_text_weights(model, config.text_weights),
        }
    _check_vocabulary(sizes.vocab_size, tokenizer, config)
    for side, report in reports.items():
        logger.info("%s from %s", side, report)
    config = dataclasses.replace(config, model=sizes)
    partial = folder.with_name(folder.name + ".tmp")
    save_model(
        partial,
        model,
        model_config=config.model,
        text_config=config.text,
        recipe=config.recipe,
        tokenizer=tokenizer,
    )
    partial.rename(folder)
    return config, {side: str(report) for side, report in reports.items()}


def _tokenizer(config: PretrainConfig, manifest: Manifest) -> Tokenizer:
    if config.text.tokenizer != "corpus":
        return Tokenizer.load(config.text.tokenizer)
    captions = (caption for row in read_captions(manifest) for caption in row)
    return Tokenizer.learn(captions, vocab_size=config.text.corpus_vocab_size)


def _check_vocabulary(vocab_size: int, tokenizer: Tokenizer, config: PretrainConfig) -> None:
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is less than the {tokenizer.vocab_size} word pieces of"
            f" --tokenizer {config.text.tokenizer}. Leave it out, or take a larger one."
        )


def _finished_model(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy the student out of the last checkpoint: a model folder without teacher and optimizer."""
    folder.mkdir(exist_ok=True)
    with checkpoint.as_directory() as source:
        for file in Path(source).iterdir():
            if file.name not in ("teacher.safetensors", "optimizer.pt", "state.json"):
                shutil.copyfile(file, folder / file.name)
    return folder
