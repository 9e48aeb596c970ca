"""MLM, masked language modeling with a look at the image, and its distilled targets."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MlmLosses:
    """The MLM loss and the two parts it mixes."""

    total: Float[Tensor, ""]
    labels: Float[Tensor, ""]
    """Cross-entropy with the word that was there (equation 3)."""
    teacher: Float[Tensor, ""]
    """Cross-entropy with the teacher's softmax (equation 7)."""


def mlm_loss(
    logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    *,
    alpha: float,
    count: Float[Tensor, ""],
    guard_empty: bool,
) -> MlmLosses:
    """Score the masked words against the true ones and the teacher's: `alpha` of the latter.

    Sums over the words are divided by `count`: N, or how many words a worker has on average. With
    `guard_empty` a batch in which nothing was masked has loss 0 (and gradient 0), not NaN.
    """
    soft = teacher_logits.softmax(dim=-1)
    if guard_empty:
        count = torch.where(count == 0, torch.ones_like(count), count)
    hard_loss = F.cross_entropy(logits, labels, reduction="sum") / count
    soft_loss = F.cross_entropy(logits, soft, reduction="sum") / count
    total = (1 - alpha) * hard_loss + alpha * soft_loss
    return MlmLosses(total=total, labels=hard_loss, teacher=soft_loss)
