"""What a quickstart is asked for. Standard library only."""

from dataclasses import dataclass
from pathlib import Path

from albef_core.config import check_counts


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """See the whole pipeline work on generated pictures, in minutes on a laptop."""

    out: Path = Path("quickstart")
    """Folder of corpora, run and `summary.json`; an earlier quickstart there is replaced."""
    num_images: int = 4000
    """Pictures to train on."""
    num_held_out: int = 500
    """Unseen pictures to evaluate on."""
    steps: int = 440
    """Optimizer steps of `tiny`."""
    batch_size: int = 32
    """Pairs in a global batch."""
    workers: int = 2
    """Train workers."""
    seed: int = 0
    """Seed of pictures, weights and training."""

    def __post_init__(self) -> None:
        check_counts(self, "num_images", "num_held_out", "steps", "batch_size", "workers")
        check_counts(self, "seed", least=0)
