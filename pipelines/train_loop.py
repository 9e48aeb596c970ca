"""What every train worker does: batches from the feed, one step each, curves, checkpoints."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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
    own_share,
)
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.optim import Schedule, adamw
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import PretrainingModel
from albef_core.teacher import Teacher, alpha_at
from albef_core.weights import load_model
from pipelines.agreement import Agreement
from pipelines.checkpoint import Snapshotter, TrainState, restore, write_snapshot
from pipelines.checkpoint_files import Progress, running_versions
from pipelines.checkpoint_writer import BackgroundWriter
from pipelines.config import PretrainConfig
from pipelines.config_file import config_digest
from pipelines.curves import Curves
from pipelines.feed import FeedBatch, FeedSpec, batches
from pipelines.flight_recorder import FlightRecorder
from pipelines.order import ORDER_VERSION, WINDOW_GROUPS
from pipelines.resume import open_store
from pipelines.tracking import RunHandle, Tracker
from pipelines.train_pictures import hard_negative_similarity, log_pictures
from pipelines.watchdog import Watchdog


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
        worker = Worker(job)
        try:
            worker.train()
        finally:
            worker.close()
    except InputError as error:
        ray.get(job.board.refuse.remote(str(error)))
        raise  # or workers that do not share the trouble would wait for this one


class Worker:
    """One rank of a training: its share of the batch, the replicas of the model, its curves."""

    def __init__(self, job: TrainJob) -> None:
        self.job, config = job, job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.watchdog = Watchdog(config.step_timeout_s, self.give_up, rank=self.rank)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, round(config.worker_cpus)))
        start = load_model(job.start, device=self.device)
        self.tokenizer = start.tokenizer
        teacher = Teacher(config.model, start.model)
        queues = Queues(config.model, config.objective, config.recipe, seed=config.seed)
        self.state = TrainState(
            student=start.model,
            teacher=teacher.train(not config.recipe.quiet_teacher),
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
        self.agreement = Agreement()
        self.store = open_store(config)
        self.writer = BackgroundWriter(self.store)
        self.snapshotter = Snapshotter(self.state) if self.rank == 0 else None
        self.saved_at = time.monotonic()
        self.curves = Curves(
            tracker=Tracker(job.handle) if self.rank == 0 else None,
            board=job.board,
            batch_size=config.batch_size,
            corpus=str(config.corpus),
            max_bad_share=config.max_bad_share,
        )
        records = config.storage / config.name / "skipped" if self.rank == 0 else None
        self.recorder = FlightRecorder(config.max_bad_steps, records)

    def train(self) -> None:
        """Go through the plan from where the newest checkpoint left it."""
        job, step = self.job, self.restore()
        for batch, waited_s in self._timed(self.feed(start=step)):
            started = time.perf_counter()
            longest = int((batch.token_ids != self.tokenizer.pad_id).sum(axis=1).max())
            with self.watchdog.part("collective"):
                agreed = self.agreement.reach(
                    step, longest=longest, must_stop=self.is_asked_to_stop()
                )
            with self.watchdog.part("step"):
                outcome = self.train_step(batch, step, longest=agreed.longest)
            step += 1
            self.curves.count(batch, busy_s=time.perf_counter() - started, waited_s=waited_s)
            is_last = step == job.num_steps or agreed.must_stop
            ends_epoch = step % job.steps_per_epoch == 0 or is_last
            with self.watchdog.part("collective"):
                if step % job.config.log_every == 0 or ends_epoch:
                    self.log(outcome, step)
                if ends_epoch:
                    self.curves.name_bad()
                    self.draw(batch, outcome, step)
            if ends_epoch or self.is_checkpoint_due(step):
                with self.watchdog.part("checkpoint"):
                    self.save(step)
            self.watchdog.beat(step)
            if is_last:
                break

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
            caption_policy=config.caption_policy,
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

    def to_device(self, batch: FeedBatch, *, longest: int) -> PairBatch:
        """Copy a batch to the device, cut to the global batch's longest caption; normalize it."""
        is_token = batch.token_ids != self.tokenizer.pad_id

        def words(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array[:, :longest], device=self.device)

        return PairBatch(
            images=normalize(torch.tensor(batch.images).to(self.device, non_blocking=True)),
            token_ids=words(batch.token_ids).long(),
            attention_mask=words(is_token),
            masked_ids=words(batch.masked_ids).long(),
            mlm_labels=words(batch.mlm_labels).long(),
            image_ids=torch.tensor(batch.image_keys, device=self.device),
            num_global=self.job.config.batch_size,
        )

    def train_step(self, feed_batch: FeedBatch, step: int, *, longest: int) -> PretrainingStep:
        """Move student, teacher and queues by one batch, in the published order.

        A batch whose loss or gradient is not finite moves the teacher only, on all workers alike.
        """
        config, state = self.job.config, self.state
        batch = self.to_device(feed_batch, longest=longest)
        state.student.clamp_temperature()
        state.teacher.follow(state.student, momentum=config.objective.teacher_momentum)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        ):
            outcome = self.model(
                state.teacher,
                state.queues,
                batch,
                alpha=self.alpha_of(step),
                recipe=config.recipe,
                seed=seed_of(config.seed, step),
                micro_batch_size=config.micro_batch_size,
            )
        state.optimizer.zero_grad()
        outcome.loss.backward()
        norm = nn.utils.clip_grad_norm_(
            state.student.parameters(), config.optim.clip_norm or math.inf
        )
        for group in state.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(step)
        if self.is_usable(feed_batch, step, loss=mean_over_workers(outcome.loss), norm=norm):
            state.optimizer.step()
            state.queues.push(
                gather_rows(outcome.teacher_image_features, num_pairs=batch.total),
                gather_rows(outcome.teacher_text_features, num_pairs=batch.total),
                gather_rows(batch.image_ids, num_pairs=batch.total),
            )
        return outcome

    def is_usable(
        self, batch: FeedBatch, step: int, *, loss: torch.Tensor, norm: torch.Tensor
    ) -> bool:
        """Tell whether a step may move anything; keep a record of the batch when it may not.

        Loss and gradient are those of the global batch: every worker answers the same.

        Raises:
            InputError: more than `max_bad_steps` in a row.
        """
        is_finite = bool(torch.isfinite(loss + norm))
        ids, captions = [], []
        if not is_finite:
            shares = gather_objects((batch.image_ids, batch.captions))
            ids = [image_id for share, _ in shares for image_id in share]
            captions = [caption for _, share in shares for caption in share]
        self.recorder.note(
            step,
            is_finite,
            loss=loss.item(),
            grad_norm=norm.item(),
            image_ids=ids,
            captions=captions,
        )
        if not is_finite and self.curves.tracker:
            self.curves.tracker.log_dict(self.recorder.artifact(), "skipped_batches.json")
            self.job.board.note.remote(
                f"step {step}: loss {loss:.3g}, gradient {norm:.3g}: the batch is skipped, its"
                " pairs are in skipped_batches.json"
            )
        if self.recorder.is_hopeless:
            self.writer.wait()
            newest = self.store.newest_good()
            raise InputError(
                f"step {step}: loss or gradient of {self.recorder.in_a_row} batches in a row is not"
                " finite; their pairs are in skipped_batches.json. The newest good checkpoint is"
                f" {newest.url if newest else 'none'}. Lower --lr, set --clip-norm 1, or take"
                " --precision fp32."
            )
        return is_finite

    def alpha_of(self, step: int) -> float:
        """Give the weight of the teacher's soft targets at a step."""
        objective = self.job.config.objective
        ramp_steps = round(objective.alpha_ramp_epochs * self.job.steps_per_epoch)
        return alpha_at(step, alpha=objective.alpha, ramp_steps=ramp_steps)

    def log(self, outcome: PretrainingStep, step: int) -> None:
        """Average over workers and write one point of every curve (a collective)."""
        temperature = self.state.student.temperature
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
        known = {"train/alpha": self.alpha_of(step - 1), "train/lr": self.schedule.lr_at(step - 1)}
        self.curves.write(values, known, step, device=self.device)

    def draw(self, batch: FeedBatch, outcome: PretrainingStep, step: int) -> None:
        """Log the pictures of what is learned (a collective)."""
        config = self.job.config
        own = own_share(config.batch_size)
        places = own if config.recipe.global_keys else range(len(own))
        tracker = self.curves.tracker
        log_pictures(tracker, batch, outcome, self.tokenizer, places=places, step=step)

    def is_checkpoint_due(self, step: int) -> bool:
        """Tell whether steps or minutes ask for a checkpoint now; never while one is written."""
        config = self.job.config
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            return True
        since_s = time.monotonic() - self.saved_at
        is_late = 0 < config.checkpoint_minutes * 60 < since_s
        return is_late and not self.writer.is_busy

    def save(self, step: int) -> None:
        """Copy the training off the device on rank 0; a thread writes it while training goes on."""
        self.saved_at = time.monotonic()
        if self.snapshotter is None or self.curves.tracker is None:
            return
        self.writer.wait()
        snapshot = self.snapshotter.take()
        config = self.job.config
        progress = Progress(
            step=step,
            pairs_seen=step * config.batch_size,
            epoch=step // self.job.steps_per_epoch,
            batch_size=config.batch_size,
            seed=config.seed,
            corpus_id=self.job.corpus_id,
            plan=self.plan(),
            config_digest=config_digest(config),
            world_size=self.world_size,
            metrics=self.curves.means_since_checkpoint(),
            unsent=self.curves.tracker.unsent(),
            versions=running_versions(),
        )
        fill = partial(write_snapshot, snapshot, config=config, tokenizer=self.tokenizer)
        self.writer.save(progress, fill)

    def restore(self) -> int:
        """Put everything where the newest good checkpoint left it; return the steps done.

        Rank 0 looks for it, and all load the same one.

        Raises:
            InputError: the checkpoint is of another order of the data.
        """
        (found, *_) = gather_objects(self.store.newest_good() if self.rank == 0 else None)
        if found is None:
            return 0
        if found.progress.plan != self.plan() and not self.job.config.force:
            raise InputError(
                f"{found.url}: made with another order of the data ({found.progress.plan} instead"
                f" of {self.plan()}). Give another --name, or --force."
            )
        with found.fetch() as folder:
            restore(folder, self.state)
        if self.curves.tracker:
            self.curves.tracker.log_again(found.progress.unsent)
        return found.progress.step

    def plan(self) -> dict[str, Any]:
        """Say what fixes the order of the data, beside the corpus."""
        return {
            "version": ORDER_VERSION,
            "seed": self.job.config.seed,
            "batch_size": self.job.config.batch_size,
            "window_groups": WINDOW_GROUPS,
            "steps_per_epoch": self.job.steps_per_epoch,
        }

    def is_asked_to_stop(self) -> bool:
        """Tell whether the driver wants an end; rank 0 asks for all."""
        return self.rank == 0 and ray.get(self.job.board.is_stopping.remote())

    def give_up(self, sentence: str) -> None:
        """End this process, stuck as it is, so that Ray Train starts the workers again."""
        ray.get(self.job.board.note.remote(sentence), timeout=10)
        os._exit(1)

    def close(self) -> None:
        """Send the last curves, and wait for the last checkpoint."""
        self.watchdog.close()
        self.curves.close()
        if self.rank == 0:
            self.writer.close()

    def _timed(self, feed: Iterator[FeedBatch]) -> Iterator[tuple[FeedBatch, float]]:
        while True:
            started = time.perf_counter()
            with self.watchdog.part("data"):
                batch = next(feed, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - started


def seed_of(seed: int, step: int) -> int:
    """Derive the seed of a step's random choices from what it may depend on, and nothing else."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return int(state[0])
