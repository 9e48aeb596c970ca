"""What entailment and NLVR2 share: a head over the fused [CLS], and its distilled loss.

Axis beside the package's own: C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from albef_core.distributed import world_size
from albef_core.keyed import Stream
from albef_core.precision import full_precision
from albef_core.pretraining import Place


@dataclass(frozen=True, kw_only=True)
class ClassificationStep:
    """What one step gives: the loss, and what is behind it."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "B C"]
    teacher_logits: Float[Tensor, "B C"]
    labels: Int[Tensor, " B"]


def two_layer_head(width: int, *, num_classes: int) -> nn.Sequential:
    """Build the head over the fused [CLS] (ALBEF section 4), started as `nn.Linear` starts."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))


def distilled_step(
    student: Callable[..., Float[Tensor, "B C"]],
    teacher: Callable[..., Float[Tensor, "B C"]],
    *rows: Tensor,
    labels: Int[Tensor, " B"],
    place: Place,
    alpha: float,
) -> ClassificationStep:
    """Let student and teacher classify the same rows, and learn from the labels and the teacher.

    Both are called with `rows` and the keys of their dropout, a micro-batch at a time.
    """
    logits = full_precision(place.chunks(student, *rows, place.keys(Stream.TEXT)))
    with torch.no_grad():
        teacher_logits = place.chunks(teacher, *rows, place.keys(Stream.TEACHER_TEXT))
    teacher_logits = full_precision(teacher_logits)
    count = place.total / world_size()
    loss = distilled_loss(logits, teacher_logits, labels, alpha=alpha, count=count)
    return ClassificationStep(
        loss=loss, logits=logits, teacher_logits=teacher_logits, labels=labels
    )


def distilled_loss(
    logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    *,
    alpha: float,
    count: float,
) -> Float[Tensor, ""]:
    """Mix the cross-entropies with the label and with the teacher's softmax (section 3.3).

    `alpha` of the latter. The sum over the rows is divided by `count`: B, or what a worker holds on
    average.
    """
    hard = F.cross_entropy(logits, labels, reduction="sum")
    soft = F.cross_entropy(logits, teacher_logits.softmax(dim=1), reduction="sum")
    return ((1 - alpha) * hard + alpha * soft) / count
