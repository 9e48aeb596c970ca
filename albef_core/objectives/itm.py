"""ITM, image-text matching, and the hard negatives it learns from (ALBEF section 3.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.model import ALBEF


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """One hard negative image for each text and one hard negative text for each image."""

    images: Int[Tensor, " B"]
    """Row of the image that text b is wrongly paired with."""
    texts: Int[Tensor, " B"]
    """Row of the text that image b is wrongly paired with."""
    exist: Bool[Tensor, " B"]
    """False where the batch holds no other photograph, so that row b has no negative."""


def negative_weights(
    similarity: Float[Tensor, "B B"], same_image: Bool[Tensor, "B B"], *, guard_empty: bool
) -> Float[Tensor, "B B"]:
    """Weigh the batch's candidates by their in-batch ITC softmax; the same image weighs nothing.

    The published code cuts after the softmax, so that a sharp row underflows to all zeros and
    cannot be sampled. With `guard_empty` the cut comes before, which weighs the rest alike, and a
    row without any candidate falls back to its plain softmax (its draw is thrown away).
    """
    if not guard_empty:
        return similarity.softmax(dim=1).masked_fill(same_image, 0)
    hopeless = same_image.all(dim=1, keepdim=True)
    return similarity.masked_fill(same_image & ~hopeless, -torch.inf).softmax(dim=1)


def sample_hard_negatives(
    weights: Float[Tensor, "B B"], generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Draw one candidate a row in proportion to its weight."""
    return torch.multinomial(weights, num_samples=1, generator=generator).squeeze(1)


def match_pairs(
    student: ALBEF,
    image_tokens: Float[Tensor, "B K I"],
    text_tokens: Float[Tensor, "B L W"],
    attention_mask: Bool[Tensor, "B L"],
    negatives: Negatives,
) -> Float[Tensor, "M 2"]:
    """Give ITM logits of B true pairs, B texts with a wrong image, B images with a wrong text."""
    texts = torch.cat([text_tokens, text_tokens, text_tokens[negatives.texts]])
    masks = torch.cat([attention_mask, attention_mask, attention_mask[negatives.texts]])
    images = torch.cat([image_tokens, image_tokens[negatives.images], image_tokens])
    return student.itm_head(student.fuse(texts, masks, images)[:, 0])


def itm_labels(num_pairs: int, device: torch.device) -> Int[Tensor, " M"]:
    """Label the rows of `match_pairs`: 1 for the true pairs, then 0 twice."""
    return (torch.arange(3 * num_pairs, device=device) < num_pairs).long()


def itm_loss(
    logits: Float[Tensor, "M 2"], labels: Int[Tensor, " M"], counts: Bool[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Cross-entropy of matched or not (equation 4), averaged over the rows that count."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * counts).sum() / counts.sum()
