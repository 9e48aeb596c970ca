"""The numbers of a training: counted on every worker, averaged, and sent on by rank 0."""

import math
import resource
from dataclasses import dataclass, field
from typing import Any

import torch

from albef_core.distributed import gather_objects, mean_over_workers, world_size
from albef_core.errors import InputError
from pipelines.feed import FeedBatch
from pipelines.tracking import Tracker

MIN_PAIRS_TO_JUDGE = 1000
"""Pairs read before the share of undecodable pictures may stop a run."""
SHOWN = ("train/loss/itc", "train/loss/itm", "train/loss/mlm", "train/pairs_per_s")
"""Curves beside the progress bar."""


@dataclass(kw_only=True)
class Curves:
    """Collects what happens between two points of the curves, and draws the points."""

    tracker: Tracker | None
    """On rank 0 only."""
    board: Any
    """The driver's ProgressBoard."""
    batch_size: int
    corpus: str
    max_bad_share: float
    bad_ids: list[str] = field(default_factory=list)
    num_pairs: int = 0
    """Pairs of all workers since the last point."""
    all_pairs: int = 0
    """Pairs of all workers since the training began or went on."""
    busy_s: float = 0.0
    waited_s: float = 0.0
    since_checkpoint: dict[str, list[float]] = field(default_factory=dict)

    def count(self, batch: FeedBatch, *, busy_s: float, waited_s: float) -> None:
        """Add one batch."""
        self.bad_ids += batch.bad_ids
        self.num_pairs += self.batch_size
        self.all_pairs += self.batch_size
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
        *values, wait_share, bad_per_worker = mean_over_workers(torch.cat([local, share])).tolist()
        num_bad = bad_per_worker * world_size()
        curves = dict(zip(averaged, values, strict=True)) | known
        curves |= {
            "pairs_seen": float(step * self.batch_size),
            "train/pairs_per_s": self.num_pairs / elapsed,
            "feed/wait_share": wait_share,
            "feed/bad_images": num_bad,
            "train/memory_gb": _memory_gb(device),
        }
        if self.tracker:
            self.tracker.log(curves, step)
            self.board.write.remote(step, {name: curves[name] for name in SHOWN})
            for name, value in curves.items():
                self.since_checkpoint.setdefault(name, []).append(value)
        self.num_pairs, self.busy_s, self.waited_s = 0, 0.0, 0.0
        is_much = num_bad > self.max_bad_share * self.all_pairs
        if is_much and self.all_pairs >= MIN_PAIRS_TO_JUDGE:
            raise InputError(
                f"{self.corpus}: {num_bad:.0f} of {self.all_pairs} pictures did not decode,"
                f" more than --max-bad-share {self.max_bad_share}."
                " Build it again with jobs/ingest.py."
            )

    def means_since_checkpoint(self) -> dict[str, float]:
        """Average each curve since this was last asked; skipped batches have no finite loss."""
        points, self.since_checkpoint = self.since_checkpoint, {}
        finite = {name: [v for v in values if math.isfinite(v)] for name, values in points.items()}
        return {name: sum(values) / len(values) for name, values in finite.items() if values}

    def name_bad(self) -> None:
        """Keep the names of all pictures that did not decode on any worker (a collective)."""
        ids = sorted({image_id for ids in gather_objects(self.bad_ids) for image_id in ids})
        if self.tracker and ids:
            self.tracker.log_dict({"did_not_decode": ids}, "bad_images.json")

    def close(self) -> None:
        """Send what is left."""
        if self.tracker:
            self.tracker.close()


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
