"""What a sweep is asked for: every field of a pre-training, and how they are searched."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from albef_core.config import check_counts
from albef_core.errors import InputError
from pipelines.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PretrainConfig):
    """Search the settings of a pre-training: many short trials, measured on held-out pictures.

    What is compared is mean recall on --val by ITC, never the training loss: alpha changes what the
    loss is, so losses of trials with different alpha say nothing about which model is better.
    """

    trials: int = 12
    """Settings to try; the first one is the preset's own."""
    axes: tuple[str, ...] = ()
    """What is varied: a field of the config by its dotted name, with a range or a list, such as
    `objective.alpha=0:1`, `optim.lr=1e-4:1e-2:log`, `batch_size=16,32,64`. Default: alpha from 0 to
    1, and the rate from a quarter to four times the preset's."""
    search: Literal["random", "grid", "model"] = "random"
    """How settings are chosen: spread at random, on a grid, or by a model of those already tried
    (Optuna)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """Who stops trials: `asha` those that are behind at a milestone; `pbt` lets them go on from the
    better one with a changed setting; `none`: nobody."""
    milestones: tuple[int, ...] = ()
    """Pairs seen at which trials are measured and compared. Default: an eighth, a quarter and a
    half of a trial."""
    reduction: int = 2
    """Of this many trials that reach a milestone, one goes on (asha)."""
    at_once: int | None = None
    """Trials that run at the same time. Default: as many as fit on the cluster."""
    confirm_seeds: int = 3
    """Fresh seeds with which the two best settings and the preset's own are trained again, for the
    final answer; 0: none."""
    bootstrap: int = 2000
    """Resamplings behind the 95 % intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_at or self.keep_best or self.register:
            raise InputError(
                "--val-at, --keep-best and --register are not a sweep's: trials are measured at"
                " --milestones and at their end, and none is registered. Leave them out."
            )
        if (self.search, self.scheduler) == ("model", "pbt"):
            raise InputError(
                "--search model does not go with --scheduler pbt, which changes settings itself."
                " Take another of one."
            )
        check_counts(self, "trials", "at_once", "bootstrap")
        check_counts(self, "reduction", least=2)
        check_counts(self, "confirm_seeds", least=0)
        if any(mark < 1 for mark in self.milestones):
            raise InputError(f"--milestones are numbers of pairs, 1 or more: {self.milestones}.")

    def pretraining(self) -> PretrainConfig:
        """Give the pre-training that trials vary."""
        shared: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(PretrainConfig)
        }
        return PretrainConfig(**shared)
