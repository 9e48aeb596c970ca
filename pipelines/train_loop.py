"""What every train worker does: batches from the feed, one step each, curves, pictures."""

import math
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from albef_core.batch import PairBatch, normalize
from albef_core.distributed import (
    gather_objects,
    gather_rows,
    is_distributed,
    mean_over_workers,
)
from albef_core.errors import InputError
from albef_core.objectives.itm import sample_hard_negatives
from albef_core.optim import Schedule, adamw
from albef_core.pretraining import PretrainingModel, PretrainingStep, Queues
from albef_core.teacher import Teacher, alpha_at
from albef_core.weights import load_model
from pipelines.checkpoint import TrainState, load_checkpoint, save_checkpoint
from pipelines.config import PretrainConfig
from pipelines.feed import FeedBatch, FeedSpec, batches
from pipelines.report import hard_negatives_figure, pseudo_targets_figure
from pipelines.tracking import RunHandle, Tracker
from pipelines.train_pictures import (
    caption_targets,
    hard_negative_similarity,
    hard_negatives,
    word_targets,
)

PICTURE_ROWS = 5
"""Pairs in the pictures of hard negatives and of pseudo-targets."""
MIN_PAIRS_TO_JUDGE = 1000
"""Pairs read before the share of undecodable pictures may stop a run."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What the driver tells its workers."""

    config: PretrainConfig
    start: Path
    """Model folder that the student starts from."""
    corpus_id: str
    num_steps: int
    steps_per_epoch: int
    handle: RunHandle
    board: Any
    """The driver's ProgressBoard."""


def train_loop(settings: dict[str, TrainJob]) -> None:
    """Train to the end of the job, from the newest checkpoint of this run where there is one.

    A mistake of the user's goes to the driver by the board; Ray Train's retry then ends at once.
    """
    job = settings["job"]
    if ray.get(job.board.read_refusal.remote()):
        return
    try:
        _train(job)
    except InputError as error:
        ray.get(job.board.refuse.remote(str(error)))
        raise  # or workers that do not share the trouble would wait for this one


def _train(job: TrainJob) -> None:
    worker = Worker(job)
    reported = ray.train.get_checkpoint()
    step = 0
    if reported is not None:
        with reported.as_directory() as folder:
            step = load_checkpoint(Path(folder), worker.state, config=job.config.model)
    try:
        for feed_batch, waited_s in _timed(worker.feed(start=step)):
            started = time.perf_counter()
            batch = worker.to_device(feed_batch)
            outcome = worker.train_step(batch, step)
            step += 1
            is_epoch_end = step % job.steps_per_epoch == 0 or step == job.num_steps
            worker.log(
                outcome, feed_batch, step, started=started, waited_s=waited_s, last=is_epoch_end
            )
            if is_epoch_end:
                worker.keep(outcome, feed_batch, step)
    finally:
        worker.close()


class Worker:
    """One rank of a training: its share of the batch, the replicas of the model, its curves."""

    def __init__(self, job: TrainJob) -> None:
        self.job, config = job, job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, round(config.worker_cpus)))
        start = load_model(job.start, device=self.device)
        self.tokenizer = start.tokenizer
        self.teacher = Teacher(config.model, start.model)
        self.teacher.train(not config.recipe.quiet_teacher)
        queues = Queues(config.model, config.objective, config.recipe, seed=config.seed)
        self.state = TrainState(
            student=start.model,
            teacher=self.teacher,
            queues=queues.to(self.device),
            optimizer=adamw(
                start.model,
                config.optim,
                decay_weights_only=config.recipe.decay_weights_only,
            ),
        )
        self.model: nn.Module = PretrainingModel(start.model)
        if is_distributed():
            self.model = DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.schedule = Schedule(
            optim=config.optim,
            num_steps=job.num_steps,
            steps_per_epoch=job.steps_per_epoch,
            per_step=config.recipe.per_step_schedule,
        )
        self.curves = Curves(job, rank=self.rank, world_size=self.world_size)

    def feed(self, *, start: int) -> Iterator[FeedBatch]:
        """Open this worker's share of the plan, from step `start` on."""
        config = self.job.config
        spec = FeedSpec(
            corpus=config.corpus,
            tokenizer=str(self.job.start),
            text=config.text,
            augment=config.augment,
            image_size=config.model.image_size,
            mask_share=config.objective.mask_share,
            keep_sep=config.recipe.keep_sep,
            words_only=config.recipe.words_only,
            saturate_pixels=config.recipe.saturate_pixels,
            seed=config.seed,
            batch_size=config.batch_size,
        )
        cpus = ray.cluster_resources().get("CPU", 1) - self.world_size * config.worker_cpus
        return batches(
            spec,
            start_step=start,
            stop_step=self.job.num_steps,
            rank=self.rank,
            world_size=self.world_size,
            task_cpus=config.feed_cpus,
            cpu_limit=max(config.feed_cpus, cpus / self.world_size),
        )

    def to_device(self, batch: FeedBatch) -> PairBatch:
        """Copy a batch to the device, cut to its longest caption, and normalize it there."""
        is_token = batch.token_ids != self.tokenizer.pad_id
        longest = int(is_token.sum(axis=1).max())

        def words(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array[:, :longest], device=self.device)

        return PairBatch(
            images=normalize(torch.tensor(batch.images).to(self.device, non_blocking=True)),
            token_ids=words(batch.token_ids).long(),
            attention_mask=words(is_token),
            masked_ids=words(batch.masked_ids).long(),
            mlm_labels=words(batch.mlm_labels).long(),
            image_ids=torch.tensor(batch.image_keys, device=self.device),
        )

    def train_step(self, batch: PairBatch, step: int) -> PretrainingStep:
        """Move student, teacher and queues by one batch, in the published order."""
        config, state = self.job.config, self.state
        torch.manual_seed(seed_of(config.seed, step, self.rank, stream=0))  # dropout
        generator = torch.Generator(self.device)
        generator.manual_seed(seed_of(config.seed, step, self.rank, stream=1))
        ramp_steps = round(config.objective.alpha_ramp_epochs * self.job.steps_per_epoch)

        state.student.clamp_temperature()
        state.teacher.follow(state.student, momentum=config.objective.teacher_momentum)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        ):
            outcome = self.model(
                state.teacher,
                state.queues,
                batch,
                alpha=alpha_at(step, alpha=config.objective.alpha, ramp_steps=ramp_steps),
                recipe=config.recipe,
                draw=lambda weights: sample_hard_negatives(weights, generator),
            )
        state.optimizer.zero_grad()
        outcome.loss.backward()
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(state.student.parameters(), config.optim.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(step)
        state.optimizer.step()
        state.queues.push(
            gather_rows(outcome.teacher_image_features),
            gather_rows(outcome.teacher_text_features),
            gather_rows(batch.image_ids),
        )
        return outcome

    def log(
        self,
        outcome: PretrainingStep,
        batch: FeedBatch,
        step: int,
        *,
        started: float,
        waited_s: float,
        last: bool,
    ) -> None:
        """Count the batch; every `log_every` steps average over workers and write the curves."""
        self.curves.count(batch, busy_s=time.perf_counter() - started, waited_s=waited_s)
        if step % self.job.config.log_every and not last:
            return
        config, temperature = self.job.config, self.state.student.temperature
        right = (outcome.itm.logits.argmax(dim=1) == outcome.itm.labels)[outcome.itm.counts]
        values = {
            "train/loss/total": outcome.loss,
            "train/loss/itc": outcome.itc.loss,
            "train/loss/itm": outcome.itm.loss,
            "train/loss/mlm": outcome.mlm.losses.total,
            "train/itm_accuracy": right.float().mean(),
            "train/hard_negative_similarity": hard_negative_similarity(outcome, temperature),
            "train/temperature": temperature,
            "train/queue_fill": self.state.queues.image.fill_share(),
        }
        ramp_steps = round(config.objective.alpha_ramp_epochs * self.job.steps_per_epoch)
        self.curves.write(
            values,
            {
                "train/alpha": alpha_at(
                    step - 1, alpha=config.objective.alpha, ramp_steps=ramp_steps
                ),
                "train/lr": self.schedule.lr_at(step - 1),
            },
            step,
            device=self.device,
        )

    def keep(self, outcome: PretrainingStep, batch: FeedBatch, step: int) -> None:
        """Write a checkpoint and the pictures of what is learned; all workers call it."""
        self.curves.name_bad()
        if self.rank == 0:
            tracker = self.curves.tracker
            negatives = hard_negatives(batch, outcome, count=PICTURE_ROWS)
            tracker.log_figure(
                hard_negatives_figure(negatives), f"pictures/hard-negatives-{step:08d}.png"
            )
            words = word_targets(batch, outcome, self.tokenizer, count=PICTURE_ROWS)
            captions = caption_targets(batch, outcome, count=PICTURE_ROWS)
            tracker.log_figure(
                pseudo_targets_figure(words, captions), f"pictures/pseudo-targets-{step:08d}.png"
            )
        with tempfile.TemporaryDirectory(prefix="albef-checkpoint-") as scratch:
            checkpoint = None
            if self.rank == 0:
                save_checkpoint(
                    Path(scratch),
                    self.state,
                    config=self.job.config,
                    tokenizer=self.tokenizer,
                    step=step,
                    corpus_id=self.job.corpus_id,
                )
                checkpoint = ray.train.Checkpoint.from_directory(scratch)
            ray.train.report(
                {"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"checkpoint-{step:08d}"
            )

    def close(self) -> None:
        """Send the last curves."""
        self.curves.close()


class Curves:
    """Counts on every worker; what rank 0 sends to MLflow and to the driver's progress bar."""

    def __init__(self, job: TrainJob, *, rank: int, world_size: int) -> None:
        self.job, self.rank, self.world_size = job, rank, world_size
        self.bad_ids: list[str] = []
        self.num_pairs, self.busy_s, self.waited_s = 0, 0.0, 0.0
        self.all_pairs = 0
        if rank == 0:
            self.tracker = Tracker(job.handle)

    def count(self, batch: FeedBatch, *, busy_s: float, waited_s: float) -> None:
        """Add one batch."""
        self.bad_ids += batch.bad_ids
        self.num_pairs += len(batch.captions)
        self.all_pairs += len(batch.captions)
        self.busy_s, self.waited_s = self.busy_s + busy_s, self.waited_s + waited_s

    def write(
        self,
        averaged: dict[str, torch.Tensor],
        known: dict[str, float],
        step: int,
        *,
        device: torch.device,
    ) -> None:
        """Average over workers (a collective), then let rank 0 write; stop on too much bad data."""
        elapsed = max(self.busy_s + self.waited_s, 1e-9)
        local = torch.stack([value.detach().float().to(device) for value in averaged.values()])
        share = torch.tensor([self.waited_s / elapsed, float(len(self.bad_ids))], device=device)
        means = mean_over_workers(torch.cat([local, share])).tolist()
        *values, wait_share, bad_per_worker = means
        if not math.isfinite(values[0]):
            raise InputError(
                f"step {step}: the loss is {values[0]}. Lower --lr, set --clip-norm 1, or keep"
                " `guard_empty` in --recipe; the checkpoint before it is good."
            )
        num_bad, num_read = bad_per_worker * self.world_size, self.all_pairs * self.world_size
        if self.rank == 0:
            curves = dict(zip(averaged, values, strict=True)) | known
            curves |= {
                "pairs_seen": float(step * self.job.config.batch_size),
                "train/pairs_per_s": self.num_pairs * self.world_size / elapsed,
                "feed/wait_share": wait_share,
                "feed/bad_images": num_bad,
                "train/memory_gb": _memory_gb(device),
            }
            self.tracker.log(curves, step)
            shown = ("train/loss/itc", "train/loss/itm", "train/loss/mlm", "train/pairs_per_s")
            self.job.board.write.remote(step, {name: curves[name] for name in shown})
        self.num_pairs, self.busy_s, self.waited_s = 0, 0.0, 0.0
        limit = self.job.config.max_bad_share
        if num_read >= MIN_PAIRS_TO_JUDGE and num_bad > limit * num_read:
            raise InputError(
                f"{self.job.config.corpus}: {num_bad:.0f} of {num_read} pictures did not decode,"
                f" more than --max-bad-share {limit}. Build it again with jobs/ingest.py."
            )

    def name_bad(self) -> None:
        """Keep the names of all pictures that did not decode on any worker (a collective)."""
        ids = sorted({image_id for ids in gather_objects(self.bad_ids) for image_id in ids})
        if self.rank == 0 and ids:
            self.tracker.log_dict({"did_not_decode": ids}, "bad_images.json")

    def close(self) -> None:
        """Send what is left."""
        if self.rank == 0:
            self.tracker.close()


def seed_of(*key: int, stream: int) -> int:
    """Derive the seed of one random choice from what it may depend on, and nothing else."""
    state = np.random.SeedSequence([*key, stream]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def _timed(feed: Iterator[FeedBatch]) -> Iterator[tuple[FeedBatch, float]]:
    while True:
        started = time.perf_counter()
        batch = next(feed, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
