"""What one training step receives, and how pixels become numbers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from albef_core.preprocess import MEAN, STD


@dataclass(frozen=True, kw_only=True)
class Share:
    """B rows of a global batch, one worker's share of it; all tensors on one device."""

    images: Float[Tensor, "B *P 3 R R"]
    """Normalized pictures, one a row, or several where a task looks at more."""
    num_global: int | None = None
    """Rows of the global batch, of which this is one worker's share; None: this is all of it."""

    @property
    def total(self) -> int:
        """Count the rows of the global batch."""
        return self.num_global or len(self)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(Share):
    """Image-caption pairs, augmented and tokenized."""

    token_ids: Int[Tensor, "B L"]
    """Captions, padded with id 0 where the mask is False."""
    attention_mask: Bool[Tensor, "B L"]
    """True on every token that is not padding."""
    image_ids: Int[Tensor, " B"]
    """Identity of each photograph: equal numbers are the same picture."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(RetrievalBatch):
    """The same for pre-training: with some words masked."""

    masked_ids: Int[Tensor, "B L"]
    """The captions as MLM sees them: some words replaced."""
    mlm_labels: Int[Tensor, "B L"]
    """The original id where MLM is scored, -100 elsewhere."""


def normalize(images: UInt8[Tensor, "B R R 3"]) -> Float[Tensor, "B 3 R R"]:
    """Turn 8-bit pixels, channels last, into the encoder's range (CLIP's mean and deviation)."""
    mean = torch.tensor(MEAN, device=images.device) * 255
    std = torch.tensor(STD, device=images.device) * 255
    return images.permute(0, 3, 1, 2).float().sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
