"""The numbers of a training: counted on every worker, averaged, and sent on by rank 0."""

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from albef_core.distributed import gather_objects, mean_over_workers
from albef_core.errors import InputError

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

MIN_PAIRS_TO_JUDGE = 1000
"""Pairs read before the share of undecodable pictures may stop a run."""
SENDING_TIMEOUT_S = 30.0


@dataclass(kw_only=True)
class Curves:
    """Collects what happens between two points of the curves, and draws the points."""

    tracker: "Tracker | None"
    """On rank 0 only."""
    board: Any
    """The driver's ProgressBoard."""
    shown: Sequence[str]
    """Curves beside the progress bar."""
    batch_size: int
    corpus: str
    max_bad_share: float
    bad_ids: list[str] = field(default_factory=list)
    """Pictures of all workers that did not decode, each as often as it was due."""
    num_pairs: int = 0
    """Pairs of all workers since the last point."""
    busy_s: float = 0.0
    waited_s: float = 0.0
    since_checkpoint: dict[str, list[float]] = field(default_factory=dict)

    def count(
        self, bad_ids: Sequence[str], *, num_bad: int, busy_s: float, waited_s: float
    ) -> None:
        """Add one batch, in which `bad_ids` did not decode here, and `num_bad` on all workers.

        Where there is one, a collective.
        """
        if num_bad:
            self.bad_ids += [image_id for ids in gather_objects(bad_ids) for image_id in ids]
        self.num_pairs += self.batch_size
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
        share = torch.tensor([self.waited_s / elapsed], device=device)
        *values, wait_share = mean_over_workers(torch.cat([local, share])).tolist()
        num_pairs, num_bad = step * self.batch_size, len(self.bad_ids)
        curves = dict(zip(averaged, values, strict=True)) | known
        curves |= {
            "pairs_seen": float(num_pairs),
            "train/pairs_per_s": self.num_pairs / elapsed,
            "feed/wait_share": wait_share,
            "feed/bad_images": float(num_bad),
            "train/memory_gb": _memory_gb(device),
        }
        self.add(curves, step)
        if self.tracker:
            self.board.write.remote(step, {name: curves[name] for name in self.shown})
        self.num_pairs, self.busy_s, self.waited_s = 0, 0.0, 0.0
        is_much = num_bad > self.max_bad_share * num_pairs
        if is_much and num_pairs >= MIN_PAIRS_TO_JUDGE:
            self.name_bad()
            self.settle()
            raise InputError(
                f"{self.corpus}: {num_bad} of {num_pairs} pictures did not decode,"
                f" more than --max-bad-share {self.max_bad_share}."
                " Build it again with jobs/ingest.py."
            )

    def add(self, values: dict[str, float], step: int) -> None:
        """Draw points that all workers know already."""
        if self.tracker:
            self.tracker.log(values, step)
            for name, value in values.items():
                self.since_checkpoint.setdefault(name, []).append(value)

    def means_since_checkpoint(self) -> dict[str, float]:
        """Average each curve since this was last asked; skipped batches have no finite loss."""
        points, self.since_checkpoint = self.since_checkpoint, {}
        finite = {name: [v for v in values if math.isfinite(v)] for name, values in points.items()}
        return {name: sum(values) / len(values) for name, values in finite.items() if values}

    def name_bad(self) -> None:
        """Keep the names of all pictures that did not decode on any worker."""
        if self.tracker and self.bad_ids:
            names = sorted(set(self.bad_ids))
            self.tracker.log_dict({"did_not_decode": names}, "bad_images.json")

    def settle(self) -> None:
        """Send what is collected before any worker ends and takes rank 0 along (a collective)."""
        if self.tracker:
            self.tracker.flush(SENDING_TIMEOUT_S)
        gather_objects(None)

    def close(self) -> None:
        """Send what is left."""
        if self.tracker:
            self.tracker.close()


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
