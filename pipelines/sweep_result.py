"""What a sweep finds: its trials, the settings trained again, the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from albef_core.paired import Difference
from pipelines.sweep_space import Axis, Point


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What became of one trial."""

    name: str
    point: Point
    measured: list[tuple[int, float]]
    """Pairs seen, and the mean recall there."""
    status: str
    """`finished`, `stopped` by the scheduler, `failed` or `died`."""
    reason: str
    """Why it failed or died; else empty."""
    is_default: bool
    """At the preset's own setting."""

    @property
    def value(self) -> float | None:
        """The mean recall that was measured last."""
        return self.measured[-1][1] if self.measured else None

    @property
    def pairs(self) -> int:
        """Pairs that it has cost."""
        return self.measured[-1][0] if self.measured else 0


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A setting trained again with fresh seeds."""

    point: Point
    values: list[float]
    """Mean recall of each seed."""
    gain: Difference | None
    """Over the preset's own setting, on the same queries; None for that setting itself."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All that a sweep found, as `sweep.json` holds it."""

    name: str
    folder: str
    axes: list[Axis]
    trials: list[TrialResult]
    confirmed: list[Confirmed]
    """The best settings and the preset's own, the best first; empty where seeds were 0."""
    best: Point
    """The setting to use: the best one where it is proven better than the preset's, else that."""
    is_proven: bool
    """The best setting beats the preset's own with an interval clear of zero."""
    command: str
    """Trains with `best`."""
    num_pairs: int
    """Pairs seen by all trials."""
    milestones: list[int]
    tracking_uri: str
    run_id: str


def format_point(point: Point) -> str:
    """Write a point as flags are written: `alpha 0.4, lr 0.002`."""
    parts = (
        f"{name.split('.')[-1]} {value:.4g}"
        if isinstance(value, float)
        else f"{name.split('.')[-1]} {value}"
        for name, value in point.items()
    )
    return ", ".join(parts)


def ranked(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Order the trials that came to their end, the best first."""
    whole = [trial for trial in trials if trial.status == "finished" and trial.value is not None]
    return sorted(whole, key=lambda trial: -(trial.value or 0.0))
