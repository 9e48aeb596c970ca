"""Real pre-training steps outside a training: their numbers, their speed, their memory."""

import gc
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from albef_core.batch import PairBatch
from albef_core.feature_queue import Queues
from albef_core.masking import NOT_SCORED
from albef_core.optim import adamw
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from albef_core.weights import load_model
from pipelines.config import PretrainConfig
from pipelines.doctor_memory import (
    Room,
    available_bytes,
    can_reset_peak,
    largest_that,
    peak_bytes,
    reset_peak,
    resident_bytes,
)
from pipelines.doctor_storage import checkpoint_bytes

MARGIN = 0.9
"""Share of the memory that may be planned with: buckets of other workers, fragments, the feed."""
MOST_DOUBLINGS = 3
"""A batch of eight times the one that is asked for is not looked for."""
SMALL = 2
"""Pairs of the smallest step on a CPU."""
MOST_FILLED = 0.1
"""Share of the free memory that trial steps on a CPU may fill."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Losses and gradients of one step."""

    num_pairs: int
    losses: dict[str, float]
    gradient_norm: float
    broken_weights: list[str]
    """Starting weights with a number that is not finite."""
    broken_gradients: list[str]

    @property
    def are_finite(self) -> bool:
        """Tell whether all of them are finite."""
        found = [*self.losses.values(), self.gradient_norm]
        return all(map(math.isfinite, found)) and not self.broken_weights


class Bench:
    """Student, teacher, queues and optimizer as a train worker has them, on one device.

    Steps do all the work of a training's, at a learning rate of zero: the weights stay. Those that
    are not finite are noted and set to zero, so that speed and memory can be measured all the same.
    """

    def __init__(self, config: PretrainConfig, start: Path, device: torch.device) -> None:
        self.config, self.device = config, device
        loaded = load_model(start, device=device)
        self.pad_id, self.vocab_size = loaded.tokenizer.pad_id, loaded.tokenizer.vocab_size
        self.student = loaded.model
        self.broken_weights = []
        for name, weight in self.student.named_parameters():
            if not weight.isfinite().all():
                self.broken_weights.append(name)
                weight.detach().nan_to_num_(posinf=0.0, neginf=0.0)
        self.teacher = Teacher(config.model, self.student)
        self.teacher.train(not config.recipe.quiet_teacher)
        self.queues = Queues(config.model, config.objective, config.recipe, seed=config.seed)
        self.queues.to(device)
        self.optimizer = adamw(
            self.student, config.optim, decay_weights_only=config.recipe.decay_weights_only
        )
        self._allocate_moments()

    def numbers(self, batch: PairBatch) -> Numbers:
        """Go forward and backward once, and look at every number."""
        outcome = self._forward_backward(batch, self.config.micro_batch_size)
        norms = {
            name: weight.grad.norm().item()
            for name, weight in self.student.named_parameters()
            if weight.grad is not None
        }
        self.optimizer.zero_grad()
        losses = {"ITC": outcome.itc.loss, "ITM": outcome.itm.loss, "MLM": outcome.mlm.losses.total}
        return Numbers(
            num_pairs=len(batch),
            losses={name: loss.item() for name, loss in losses.items()},
            gradient_norm=math.hypot(*norms.values()),
            broken_weights=self.broken_weights,
            broken_gradients=[name for name, norm in norms.items() if not math.isfinite(norm)],
        )

    def seconds_of(self, batch: PairBatch) -> float:
        """Time one whole step."""
        started = time.perf_counter()
        self._step(batch, self.config.micro_batch_size)
        return time.perf_counter() - started

    def pairs_per_s(self, batch: PairBatch, *, limit_s: float) -> float:
        """Time steps of this batch, the first left out where there is time for a second."""
        seconds = [self.seconds_of(batch)]
        stop = time.monotonic() + limit_s - seconds[0]
        while time.monotonic() < stop and len(seconds) < 20:
            seconds.append(self.seconds_of(batch))
        return len(batch) / statistics.median(seconds[1:] or seconds)

    def batch(self, num_pairs: int) -> PairBatch:
        """Make a batch of noise with captions of full length, which take the most memory."""
        num_tokens, size = self.config.text.max_tokens, self.config.model.image_size
        generator = torch.Generator().manual_seed(self.config.seed)
        words = torch.randint(5, self.vocab_size, (num_pairs, num_tokens), generator=generator)
        is_scored = torch.rand(words.shape, generator=generator) < self.config.objective.mask_share
        images = torch.randn(1, 3, size, size, generator=generator).to(self.device)
        return PairBatch(
            images=images.expand(num_pairs, -1, -1, -1).contiguous(),
            token_ids=words.to(self.device),
            attention_mask=torch.ones_like(words, dtype=torch.bool, device=self.device),
            masked_ids=words.to(self.device),
            mlm_labels=words.masked_fill(~is_scored, NOT_SCORED).to(self.device),
            image_ids=torch.arange(num_pairs, device=self.device),
        )

    def room(self, wanted: int, *, limit_s: float, num_workers: int) -> Room | None:
        """Find the largest batch that this device holds; None where that cannot be measured.

        Args:
            wanted: pairs that a worker is to hold at once.
            limit_s: seconds that the search may take.
            num_workers: train workers that share this machine's memory (CPU only).
        """
        if self.device.type == "cuda":
            return self._room_of_gpu(wanted, limit_s=limit_s)
        if not can_reset_peak():
            return None
        return self._room_of_cpu(wanted, limit_s=limit_s, num_workers=num_workers)

    def _room_of_gpu(self, wanted: int, *, limit_s: float) -> Room:
        peaks: dict[int, int] = {}
        seconds: dict[int, float] = {}

        def fits(size: int) -> bool:
            resting, started = self._empty_gpu(), time.perf_counter()
            is_good = self._fits(size)
            if is_good:
                peaks[size] = torch.cuda.max_memory_allocated(self.device) - resting
                seconds[size] = time.perf_counter() - started
            return is_good

        most = wanted * 2**MOST_DOUBLINGS
        largest, is_open = largest_that(fits, first=min(wanted, 8), most=most, limit_s=limit_s)
        self._empty_gpu()
        return Room(
            largest=int(largest * MARGIN) if largest > 1 else largest,
            is_measured=True,
            at_least=is_open,
            bytes_per_pair=peaks.get(largest, 0) / max(1, largest),
            memory_bytes=torch.cuda.get_device_properties(self.device).total_memory,
            seconds_per_pair=seconds.get(largest, 0.0) / max(1, largest),
        )

    def _fits(self, num_pairs: int) -> bool:
        try:
            self._step(self.batch(num_pairs), None)
        except torch.OutOfMemoryError:
            return False
        return True

    def _empty_gpu(self) -> int:
        """Give back all that a step left; return the bytes that stay."""
        self.optimizer.zero_grad()
        gc.collect()  # a step that ran out of memory leaves cycles of frames and tensors
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _room_of_cpu(self, wanted: int, *, limit_s: float, num_workers: int) -> Room:
        """Double small steps while there is time: a machine without memory kills processes.

        A step's memory over its pairs is an upper bound of what one more pair takes, for a part of
        it is the same for any number; at the batch that is asked for it is exact.
        """
        stop = time.monotonic() + limit_s
        reset_peak()
        resting, size = resident_bytes(), min(SMALL, wanted)
        seconds, peak = self._time_and_peak(size)
        most = MOST_FILLED * available_bytes()
        while size < wanted and peak - resting < most and time.monotonic() + 3 * seconds < stop:
            size = min(2 * size, wanted)
            seconds, peak = self._time_and_peak(size)
        bytes_per_pair = max(1, peak - resting) / size
        # Every worker of this machine wants what this one has, and one a copy for checkpoints.
        memory = MARGIN * (available_bytes() + resident_bytes()) / num_workers
        room = memory - resting - checkpoint_bytes(self.config)
        return Room(
            largest=max(0, int(room / bytes_per_pair)),
            is_measured=False,
            at_least=False,
            bytes_per_pair=bytes_per_pair,
            memory_bytes=memory,
            seconds_per_pair=seconds / size,
        )

    def _time_and_peak(self, num_pairs: int) -> tuple[float, int]:
        batch = self.batch(num_pairs)
        reset_peak()
        started = time.perf_counter()
        self._step(batch, None)
        return time.perf_counter() - started, peak_bytes()

    def _forward_backward(self, batch: PairBatch, micro_batch_size: int | None) -> PretrainingStep:
        config = self.config
        self.student.clamp_temperature()
        self.optimizer.zero_grad()
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
        ):
            outcome = pretraining_step(
                self.student,
                self.teacher,
                self.queues,
                batch,
                alpha=config.objective.alpha,
                recipe=config.recipe,
                seed=config.seed,
                micro_batch_size=micro_batch_size,
            )
        outcome.loss.backward()
        return outcome

    def _step(self, batch: PairBatch, micro_batch_size: int | None) -> None:
        outcome = self._forward_backward(batch, micro_batch_size)
        self.teacher.follow(self.student, momentum=self.config.objective.teacher_momentum)
        clip_norm = self.config.optim.clip_norm or math.inf
        nn.utils.clip_grad_norm_(self.student.parameters(), clip_norm).item()
        self.optimizer.step()
        push_step(self.queues, outcome, num_pairs=len(batch))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocate_moments(self) -> None:
        """Let AdamW make its moments before memory is measured."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for weight in self.student.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
