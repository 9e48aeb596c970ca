"""What one pre-training step gives: losses, and what tests, curves and pictures want to know."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.objectives.itm import Negatives
from albef_core.objectives.mlm import MlmLosses


@dataclass(frozen=True, kw_only=True)
class Itc:
    """What the contrast of a batch gives: the loss, and the matrices behind it."""

    loss: Float[Tensor, ""]
    i2t_loss: Float[Tensor, ""]
    t2i_loss: Float[Tensor, ""]
    i2t: Float[Tensor, "B K"]
    t2i: Float[Tensor, "B K"]
    teacher_i2t: Float[Tensor, "B K"]
    teacher_t2i: Float[Tensor, "B K"]
    i2t_targets: Float[Tensor, "B K"]
    t2i_targets: Float[Tensor, "B K"]
    is_positive: Bool[Tensor, "B K"]


@dataclass(frozen=True, kw_only=True)
class Itm:
    """What the matching of a batch gives: the loss, the draws, and the matrices behind them."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "M 2"]
    labels: Int[Tensor, " M"]
    counts: Bool[Tensor, " M"]
    negatives: Negatives
    image_weights: Float[Tensor, "B C"]
    text_weights: Float[Tensor, "B C"]


@dataclass(frozen=True, kw_only=True)
class Mlm:
    """What the filling-in of a batch gives: the losses and the logits at the N masked tokens."""

    losses: MlmLosses
    logits: Float[Tensor, "N V"]
    teacher_logits: Float[Tensor, "N V"]


@dataclass(frozen=True, kw_only=True)
class RetrievalStep:
    """The losses of one batch, and all that tests, curves and pictures want to know of it."""

    itc: Itc
    itm: Itm
    image_features: Float[Tensor, "B D"]
    text_features: Float[Tensor, "B D"]
    teacher_image_features: Float[Tensor, "B D"]
    """For the queue, as the texts' and the ids are."""
    teacher_text_features: Float[Tensor, "B D"]
    image_ids: Int[Tensor, " B"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """ITC + ITM."""
        return self.itc.loss + self.itm.loss


@dataclass(frozen=True, kw_only=True)
class PretrainingStep(RetrievalStep):
    """The same with MLM."""

    mlm: Mlm

    @property
    def loss(self) -> Float[Tensor, ""]:
        """ITC + ITM + MLM (equation 5)."""
        return self.itc.loss + self.itm.loss + self.mlm.losses.total
