"""The doctor's trial worker: with the resources of a train worker it feeds, steps and fills memory.

It is a Ray actor where a train worker would be, so that what it measures is what a training gets.
"""

import dataclasses
import gc
import math
import time
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from albef_core.batch import PairBatch
from pipelines.config import PretrainConfig
from pipelines.doctor_bench import Bench, Numbers
from pipelines.doctor_memory import Room
from pipelines.feed import batches
from pipelines.inputs import feed_spec, num_tokens, to_device
from pipelines.pairs import FeedBatch
from pipelines.resources import feed_cpus_of_worker

FEED_STEPS = 400
"""Steps that the trial feed is planned for; planning costs a millisecond each."""
COMFORT = 1.2
"""A feed that is faster than the step by less than this will sometimes be waited for."""
STEP_SECONDS = 8.0
"""A single trial step is cut to as many pairs as take no longer than this."""


@dataclass(frozen=True, kw_only=True)
class FeedRate:
    """What the feed gives one worker."""

    pairs_per_s: float
    first_s: float
    """Seconds until the first batch."""
    cpus: float
    """Logical CPUs that the worker's decoding tasks may hold."""


@dataclass(frozen=True, kw_only=True)
class StepRate:
    """What one worker's device takes."""

    pairs_per_s: float
    num_pairs: int
    """Pairs in a step; fewer than asked for where the device is slow or small."""
    device: str


class TrialWorker:
    """One worker of a training that never starts."""

    def __init__(self, config: PretrainConfig, start: Path, *, use_gpu: bool) -> None:
        self.config, self.start = config, start
        self.device = torch.device("cuda" if use_gpu else "cpu")
        if not use_gpu:
            torch.set_num_threads(max(1, round(config.worker_cpus)))
        self.share = math.ceil(config.batch_size / config.num_processes)
        self.bearable = min(self.share, 8)
        """Pairs that a step may have here, in memory and time; `room` finds out."""
        self._bench: Bench | None = None
        self._first: FeedBatch | None = None

    @property
    def bench(self) -> Bench:
        """Build the model at its first use: a check that fails there does not fail the others."""
        if self._bench is None:
            self._bench = Bench(self.config, self.start, self.device)
        return self._bench

    def room(self, limit_s: float, workers_here: int) -> Room | None:
        """Find the largest batch, and from then on take no larger one."""
        config, bench = self.config, self.bench
        at_once = min(self.share, config.micro_batch_size or self.share)
        room = bench.room(at_once, limit_s=limit_s, num_workers=workers_here)
        if room is None:
            return None
        fits = self.share if at_once < self.share else min(self.share, max(1, room.largest))
        quick = int(STEP_SECONDS / max(room.seconds_per_pair, 1e-6))
        self.bearable = max(1, min(fits, quick))
        return room

    def numbers(self) -> Numbers:
        """Look at losses and gradients of the run's first batch, or of its first pairs."""
        return self.bench.numbers(self._real_batch())

    def step_rate(self, limit_s: float) -> StepRate:
        """Time steps of real pairs."""
        batch = self._real_batch()
        rate = self.bench.pairs_per_s(batch, limit_s=limit_s)
        device = f"CPU, threads: {torch.get_num_threads()}"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name()
        return StepRate(pairs_per_s=rate, num_pairs=len(batch), device=device)

    def feed_rate(self, limit_s: float) -> FeedRate:
        """Take batches of the real feed for some seconds after the arrival of the first one."""
        config = self.config
        cpu_limit = feed_cpus_of_worker(
            config,
            num_workers=config.num_processes,
            num_cpus=ray.cluster_resources().get("CPU", 1),
        )
        started = time.perf_counter()
        feed = batches(
            feed_spec(config, self.start),
            start_step=0,
            stop_step=FEED_STEPS,
            rank=config.num_processes - 1,
            world_size=config.num_processes,
            task_cpus=config.feed_cpus,
            cpu_limit=cpu_limit,
        )
        self._first = next(feed)
        begin = time.perf_counter()
        arrivals = [(0.0, 0)]
        for batch in feed:
            arrivals.append((time.perf_counter() - begin, arrivals[-1][1] + len(batch.captions)))
            if arrivals[-1][0] > limit_s:
                break
        del feed
        gc.collect()  # ends the tasks of the data set, which would slow what is measured next
        # The processes of the tasks start one after the other: only the second half counts.
        early = next(one for one in arrivals if one[0] >= arrivals[-1][0] / 2)
        ahead = early if early != arrivals[-1] else arrivals[0]
        seconds, num_pairs = arrivals[-1][0] - ahead[0], arrivals[-1][1] - ahead[1]
        return FeedRate(pairs_per_s=num_pairs / seconds, first_s=begin - started, cpus=cpu_limit)

    def _real_batch(self) -> PairBatch:
        """Give the run's first batch, or as many of its pairs as are bearable."""
        if self._first is None:
            self.feed_rate(0.0)
        first, num_pairs = self._first, self.bearable
        assert first is not None
        cut = dataclasses.replace(
            first,
            images=first.images[:num_pairs],
            token_ids=first.token_ids[:num_pairs],
            masked_ids=first.masked_ids[:num_pairs],
            mlm_labels=first.mlm_labels[:num_pairs],
            image_keys=first.image_keys[:num_pairs],
        )
        pad_id = self.bench.pad_id
        return to_device(
            cut,
            self.device,
            pad_id=pad_id,
            longest=num_tokens(cut, pad_id=pad_id),
            num_global=len(cut.images),
        )
