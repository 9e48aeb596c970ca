"""The teacher: a moving average of the student; and the ramp of alpha, the weight of its advice."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from albef_core.config import ModelConfig
from albef_core.model import ALBEF, Encoders

Model = TypeVar("Model", bound=nn.Module)


class Teacher(Encoders):
    """Momentum encoders whose features fill the queues and whose softmax softens the targets.

    Averages both encoders, both projections, the multimodal encoder and the MLM head (ALBEF section
    3.2). Its weights take no gradient and move only through `follow`.
    """

    def __init__(self, config: ModelConfig, student: ALBEF) -> None:
        super().__init__(config)
        if not hasattr(student, "mlm_head"):
            self.drop_mlm_head()
        self.load_state_dict(student.state_dict(), strict=False)
        self.to(student.temperature.device).requires_grad_(False)

    def follow(self, student: ALBEF, *, momentum: float) -> None:
        """Move every weight towards the student's: `momentum` of the old, the rest of the new."""
        follow(self, student, momentum=momentum)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Move each weight of a teacher towards the student's weight of the same name.

    `momentum` of the old stays (ALBEF section 3.2: 0.995). What only the student has, heads that
    are not distilled, is left out.
    """
    theirs = dict(student.named_parameters())
    names, own = zip(*teacher.named_parameters(), strict=True)
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # torch has no public name
        own, [theirs[name] for name in names], 1 - momentum
    )


def frozen_copy(student: Model) -> Model:
    """Make the teacher of a downstream task: all of the student as it is now, without gradient."""
    return deepcopy(student).requires_grad_(False)


def with_weights_of(teacher: nn.Module, student: Model) -> Model:
    """Copy a student, and give the copy its teacher's weights; what is not distilled stays."""
    copy = deepcopy(student)
    copy.load_state_dict(teacher.state_dict(), strict=False)
    return copy


def alpha_at(step: int, *, alpha: float, ramp_steps: int) -> float:
    """Give the soft targets' weight at a step: linear from 0 over `ramp_steps`, then constant.

    The paper and the published code ramp over the first epoch.
    """
    return alpha * min(1.0, step / ramp_steps) if ramp_steps > 0 else alpha
