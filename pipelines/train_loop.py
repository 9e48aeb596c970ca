"""What every train worker does: batches from the feed, one step each, curves, checkpoints."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import ray.train.torch
import torch
from ray import cloudpickle
from torch import nn

from albef_core.distributed import gather_objects, mean_over_workers, rank, world_size
from albef_core.errors import InputError
from albef_core.optim import Schedule, adamw
from albef_core.teacher import alpha_at
from pipelines.agreement import Agreement
from pipelines.checkpoint import TrainState
from pipelines.config import TrainConfig
from pipelines.curves import Curves
from pipelines.feed import batches
from pipelines.flight_recorder import FlightRecorder
from pipelines.resources import feed_cpus_of_worker
from pipelines.saver import Saver
from pipelines.task import Batch, Outcome, Task
from pipelines.watchdog import Watchdog

if TYPE_CHECKING:
    from pipelines.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What the driver tells its workers."""

    config: TrainConfig
    task: Callable[[TrainConfig, Path, torch.device], Task]
    """Makes a worker's task of config, `start` and device."""
    start: Path
    """Model folder that the student starts from."""
    corpus_id: str
    num_steps: int
    steps_per_epoch: int
    tracking_uri: str
    run_id: str
    board: Any
    """The driver's ProgressBoard."""
    on_gpu: bool


def train_loop(settings: dict[str, bytes]) -> None:
    """Train to the end of the pickled `job`, from this run's newest checkpoint if there is one.

    A mistake of the user's goes to the driver by the board; Ray Train's retry then ends at once.
    """
    job: TrainJob = cloudpickle.loads(settings["job"])
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
        self.rank, self.world_size = rank(), world_size()
        self.watchdog = Watchdog(config.step_timeout_s, self.give_up, rank=self.rank)
        # Ray Train knows which GPU is this worker's; a process alone has no Ray Train around it.
        alone = torch.device("cuda" if job.on_gpu else "cpu")
        self.device = ray.train.torch.get_device() if config.workers else alone
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, round(config.worker_cpus)))
        self.task = job.task(config, job.start, self.device)
        decay_weights_only = config.recipe.decay_weights_only
        self.state = TrainState(
            student=self.task.student,
            teacher=self.task.teacher,
            queues=self.task.queues,
            optimizer=adamw(self.task.student, config.optim, decay_weights_only=decay_weights_only),
        )
        self.schedule = Schedule(
            optim=config.optim,
            num_steps=job.num_steps,
            steps_per_epoch=job.steps_per_epoch,
            per_step=config.recipe.per_step_schedule,
        )
        self.agreement = Agreement()
        self.curves = Curves(
            tracker=_open_tracker(job) if self.rank == 0 else None,
            board=job.board,
            shown=self.task.shown,
            batch_size=config.batch_size,
            corpus=str(config.corpus),
            max_bad_share=config.max_bad_share,
        )
        self.saver = Saver(
            config,
            self.state,
            self.curves,
            save=self.task.save,
            text_layers=self.task.text_layers,
            corpus_id=job.corpus_id,
            steps_per_epoch=job.steps_per_epoch,
        )
        records = config.storage / config.name / "skipped" if self.rank == 0 else None
        self.recorder = FlightRecorder(records)

    def train(self) -> None:
        """Go through the plan from where the newest checkpoint left it."""
        job, step = self.job, self.saver.restore()
        for batch, waited_s in self._timed(self.feed(start=step)):
            started = time.perf_counter()
            longest = self.task.longest(batch)
            with self.watchdog.part("collective"):
                must_stop, must_save = self.read_wishes()
                agreed = self.agreement.reach(
                    step, longest=longest, num_bad=len(batch.bad_ids), must_stop=must_stop
                )
            with self.watchdog.part("step"):
                outcome = self.train_step(batch, step, longest=agreed.longest)
            step += 1
            times = {"busy_s": time.perf_counter() - started, "waited_s": waited_s}
            is_last = step == job.num_steps
            ends_epoch = step % job.steps_per_epoch == 0 or is_last
            with self.watchdog.part("collective"):
                self.curves.count(batch.bad_ids, num_bad=agreed.num_bad, **times)
                if step % job.config.log_every == 0 or ends_epoch:
                    self.log(outcome, step)
                if ends_epoch:
                    self.agreement.check_replicas(self.state.student)
                    self.curves.name_bad()
                    self.task.draw(self.curves.tracker, batch, outcome, step=step)
            is_measured = ends_epoch or self.passes_milestone(step)
            if is_measured and job.config.val:
                with self.watchdog.part("validation"):
                    self.validate(job.config.val, step)
            # Within a row of skipped batches nothing moves: a checkpoint would only push out one
            # from before it.
            is_due = (is_measured or self.saver.is_due(step)) and not self.recorder.in_a_row
            if is_due or is_last or agreed.must_stop or must_save:
                with self.watchdog.part("checkpoint"):
                    self.saver.save(step)
                    if must_save:
                        self.saver.wait()
                        job.board.note_checkpoint.remote()
            self.watchdog.beat(step)
            if agreed.must_stop:
                break

    def feed(self, *, start: int) -> Iterator[Batch]:
        """Open this worker's share of the plan, from step `start` on."""
        config = self.job.config
        num_cpus = ray.cluster_resources().get("CPU", 1)
        return batches(
            self.task.spec,
            start_step=start,
            stop_step=self.job.num_steps,
            rank=self.rank,
            world_size=self.world_size,
            task_cpus=config.feed_cpus,
            cpu_limit=feed_cpus_of_worker(config, num_workers=self.world_size, num_cpus=num_cpus),
        )

    def train_step(self, batch: Batch, step: int, *, longest: int) -> Outcome:
        """Move student, teacher and queues by one batch, in the published order.

        A batch whose loss or gradient is not finite moves the teacher only, on all workers alike.
        """
        config, state = self.job.config, self.state
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        ):
            outcome = self.task.forward(
                batch,
                longest=longest,
                alpha=self.alpha_of(step),
                seed=seed_of(config.seed, step),
            )
        state.optimizer.zero_grad()
        outcome.loss.backward()
        norm = nn.utils.clip_grad_norm_(
            state.student.parameters(), config.optim.clip_norm or math.inf
        )
        for group in state.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(step)
        if self.is_usable(batch, step, loss=mean_over_workers(outcome.loss), norm=norm):
            state.optimizer.step()
            self.task.accept(outcome)
        return outcome

    def is_usable(self, batch: Batch, step: int, *, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Tell whether a step may move anything; keep a record of the batch when it may not.

        Loss and gradient are those of the global batch: every worker answers the same.

        Raises:
            InputError: more than `max_bad_steps` in a row.
        """
        if torch.isfinite(loss + norm):
            self.recorder.clear(step)
            return True
        shares = gather_objects((batch.image_ids, batch.captions))
        self.recorder.note(
            step,
            loss=loss.item(),
            grad_norm=norm.item(),
            image_ids=[image_id for ids, _ in shares for image_id in ids],
            captions=[caption for _, captions in shares for caption in captions],
        )
        if self.curves.tracker:
            self.curves.tracker.log_dict(self.recorder.artifact(), "skipped_batches.json")
            self.job.board.note.remote(
                f"step {step}: loss {loss:.3g}, gradient {norm:.3g}: the batch is skipped, its"
                " pairs are in skipped_batches.json"
            )
        # Rank 0 alone has the records from before a restart.
        in_a_row, *_ = gather_objects(self.recorder.in_a_row)
        if in_a_row > self.job.config.max_bad_steps:
            self.end_hopeless(step, in_a_row)
        return False

    def end_hopeless(self, step: int, in_a_row: int) -> NoReturn:
        """End the training, with the checkpoint named from which another setting may go on."""
        self.curves.settle()
        # The weights of the last step before the row may be what ruined it: one whose next batch
        # was finite is meant.
        newest = self.saver.newest(before=step + 1 - in_a_row)
        raise InputError(
            f"step {step}: loss or gradient of {in_a_row} batches in a row is not finite; their"
            " pairs are in skipped_batches.json. "
            + (
                f"The newest good checkpoint is {newest}: --resume it under another --name, with"
                " --force and"
                if newest
                else "No checkpoint is older than they are: begin again under another --name, with"
            )
            + " a lower --lr, --clip-norm 1, or --precision fp32."
        )

    def alpha_of(self, step: int) -> float:
        """Give the weight of the teacher's soft targets at a step."""
        objective = self.job.config.objective
        ramp_steps = round(objective.alpha_ramp_epochs * self.job.steps_per_epoch)
        return alpha_at(step, alpha=objective.alpha, ramp_steps=ramp_steps)

    def log(self, outcome: Outcome, step: int) -> None:
        """Average over workers and write one point of every curve (a collective)."""
        values = self.task.curves(outcome)
        known = {"train/alpha": self.alpha_of(step - 1), "train/lr": self.schedule.lr_at(step - 1)}
        self.curves.write(values, known, step, device=self.device)

    def passes_milestone(self, step: int) -> bool:
        """Tell whether a pair of `--val-at` was among those of the step that ends at `step`."""
        seen = step * self.job.config.batch_size
        return any(0 <= seen - mark < self.job.config.batch_size for mark in self.job.config.val_at)

    def validate(self, corpus: Path, step: int) -> None:
        """Measure on the held-out corpus, and say so (a collective)."""
        config, found = self.job.config, self.task.validate(corpus)
        self.curves.add(found.curves, step)
        if self.curves.tracker:
            found.write(config.storage / config.name)
            self.job.board.measure.remote(step, found.curves)

    def read_wishes(self) -> tuple[bool, bool]:
        """Tell whether the driver wants an end, and whether a checkpoint; rank 0 asks for all."""
        return ray.get(self.job.board.read_wishes.remote()) if self.rank == 0 else (False, False)

    def give_up(self, sentence: str) -> None:
        """End this process, stuck as it is, so that Ray Train starts the workers again."""
        try:
            ray.get(self.job.board.note.remote(sentence), timeout=10)
        finally:
            os._exit(1)

    def close(self) -> None:
        """Wait for the last checkpoint, and send the last curves."""
        self.watchdog.close()
        try:
            self.saver.close()
        finally:
            self.curves.close()

    def _timed(self, feed: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
        while True:
            started = time.perf_counter()
            with self.watchdog.part("data"):
                batch = next(feed, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - started


def _open_tracker(job: TrainJob) -> "Tracker":
    from pipelines.tracking import RunHandle, Tracker  # noqa: PLC0415  # seconds, on rank 0 alone

    return Tracker(RunHandle(job.tracking_uri, job.run_id))


def seed_of(seed: int, step: int) -> int:
    """Derive the seed of a step's random choices from what it may depend on, and nothing else."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return int(state[0])
