"""What a user can turn about the model registry: the gate file, and the acts of jobs/promote.py.

Standard library only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albef_core.config import check_counts, check_range
from albef_core.errors import InputError

METRICS = {
    "retrieval": ("itm", "itc"),
    "entailment": ("accuracy",),
    "vqa": ("accuracy",),
    "nlvr2": ("accuracy",),
    "grounding": ("pointing_game", "energy_in_box", "box_accuracy"),
}
"""What each task can be judged by, the default first; of retrieval the stage whose mean recall it
is."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a candidate must be good at; all scores are shares of 1."""

    task: Literal["retrieval", "entailment", "vqa", "nlvr2", "grounding"]
    """What is evaluated, as jobs/evaluate.py has it."""
    corpus: Path
    """Corpus of held-out pictures."""
    metric: str = ""
    """Of retrieval `itm` or `itc`, the stage whose mean recall counts; of grounding
    `pointing_game`, `energy_in_box` or `box_accuracy`; else `accuracy`. Default: the first."""
    min_value: float | None = None
    """The score must reach this, also where there is no champion."""
    min_gain: float | None = None
    """The interval of candidate less champion must lie above this. Default: 0, proven better."""
    max_loss: float | None = None
    """In place of `min_gain`: the interval must lie above minus this, proven not worse by more."""
    top_k: int = 128
    """Candidates per query that ITM re-ranks, or answers that are read in full."""

    def __post_init__(self) -> None:
        if self.metric and self.metric not in METRICS[self.task]:
            names = ", ".join(METRICS[self.task])
            raise InputError(f"metric {self.metric!r} is none of {self.task}. There are: {names}.")
        if self.min_gain is not None and self.max_loss is not None:
            raise InputError(
                f"min_gain {self.min_gain} and max_loss {self.max_loss} contradict each other."
                " Give one of them."
            )
        check_counts(self, "top_k")
        for name in ("min_value", "min_gain", "max_loss"):
            if getattr(self, name) is not None:
                check_range(self, name, high=1.0)

    @property
    def column(self) -> str:
        """Name the scores that count."""
        return self.metric or METRICS[self.task][0]

    @property
    def least_gain(self) -> float:
        """Give what the lower end of the difference must be above."""
        return (self.min_gain or 0.0) if self.max_loss is None else -self.max_loss


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a version of a registered model must prove before it becomes the champion."""

    model: str
    """Name in the MLflow model registry."""
    checks: tuple[Check, ...]
    """All of them must hold."""
    confidence: float = 0.95
    """Share of the resamplings that lie in the interval of a difference."""
    num_resamples: int = 2000
    """Resamplings of the pictures behind it."""
    min_pictures: int = 30
    """With fewer pictures an interval proves nothing, and a check fails for too little evidence."""
    seed: int = 0
    """Seed of the resampling."""
    max_latency_ms: float | None = None
    """Longest time for a pair or example on the machine that judges, in milliseconds."""
    max_size_mb: float | None = None
    """Largest model folder, in MB of a million bytes."""
    max_leak_share: float | None = None
    """Largest share of a check's pictures that the candidate has learned from."""

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("model is empty. Name a registered model, such as albef-pretrain.")
        if not self.checks:
            raise InputError("checks is empty: a gate without any lets everything through.")
        check_counts(self, "num_resamples", "min_pictures")
        check_counts(self, "seed", least=0)
        check_range(self, "confidence", low=0.5, high=0.9999)
        for name in ("max_latency_ms", "max_size_mb"):
            if getattr(self, name) is not None:
                check_range(self, name)
        if self.max_leak_share is not None:
            check_range(self, "max_leak_share", high=1.0)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Weigh a version against the champion, and say whether the gate would let it through."""

    gate: Path
    """Gate file (YAML), such as gates/pretrain.yaml."""
    candidate: str = ""
    """Version number or alias. Default: the newest version."""
    batch_size: int = 64
    """Pairs or examples per forward pass, where something is still to be evaluated."""
    actors: int = 1
    """Processes that hold the model then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs then."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "actors")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig(CheckConfig):
    """Make a version the champion, if the gate lets it through; the old one becomes `previous`."""

    why: str = ""
    """Reason, for the history."""


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """Make the previous champion the champion again, once it is proven to work as it did."""

    model: str
    """Name in the MLflow model registry."""
    why: str = ""
    """Reason, for the history."""


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """Print all acts on a registered model, the refused ones too."""

    model: str
    """Name in the MLflow model registry."""


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """Show two versions side by side: corpora, metrics, configs, files."""

    one: str
    """Version, as models:/NAME/3 or models:/NAME@champion."""
    other: str
    """The other one."""
