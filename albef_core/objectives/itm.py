"""ITM, image-text matching, and the hard negatives it learns from (ALBEF section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.model import ALBEF
from albef_core.text_encoder import Projected


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """One hard negative image for each text and one hard negative text for each image."""

    images: Int[Tensor, " B"]
    """Column of the ITC similarities whose image text b is wrongly paired with."""
    texts: Int[Tensor, " B"]
    """Column of the ITC similarities whose text image b is wrongly paired with."""
    exist: Bool[Tensor, " B"]
    """False where the batch holds no other photograph, so that row b has no negative."""


def negative_weights(
    similarity: Float[Tensor, "B C"], same_image: Bool[Tensor, "B C"], *, guard_empty: bool
) -> Float[Tensor, "B C"]:
    """Weigh a batch's candidates by their ITC softmax; the same image weighs nothing.

    The published code cuts after the softmax, so that a sharp row underflows to all zeros and
    cannot be sampled. With `guard_empty` the cut comes before, which weighs the rest alike, and a
    row without any candidate falls back to its plain softmax (its draw is thrown away).
    """
    if not guard_empty:
        return similarity.softmax(dim=1).masked_fill(same_image, 0)
    hopeless = same_image.all(dim=1, keepdim=True)
    return similarity.masked_fill(same_image & ~hopeless, -torch.inf).softmax(dim=1)


def draw_hard_negatives(
    weights: Float[Tensor, "B C"], uniforms: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """Draw one candidate a row in proportion to its weight, with one number of [0, 1) a row.

    By inversion of the cumulative weights, because then a row's draw depends on its own number
    and on nothing else. Raises RuntimeError where a row has no candidate.
    """
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]  # the public one waits
        (total != 0).all(), "a row has no candidate for a hard negative"
    )
    found = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).squeeze(1)
    return found.clamp(max=weights.shape[1] - 1)


def match_pairs(
    student: ALBEF,
    images: Float[Tensor, "B K I"] | Sequence[Projected],
    wrong_images: Float[Tensor, "B K I"] | Sequence[Projected],
    text_tokens: Float[Tensor, "B L W"],
    attention_mask: Bool[Tensor, "B L"],
    wrong_tokens: Float[Tensor, "B L W"],
    wrong_mask: Bool[Tensor, "B L"],
    *keys: Int[Tensor, " B"],
) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """Give ITM logits of true pairs, of texts with a wrong image, of images with a wrong text.

    One pass for all three, with each image's keys and values made once. Images are tokens, or what
    `project` has made of them. `keys` fix the dropout of the three; see `albef_core.keyed`.
    """
    if isinstance(images, Tensor):
        images = student.project(images)
    if isinstance(wrong_images, Tensor):
        wrong_images = student.project(wrong_images)
    texts = torch.cat([text_tokens, text_tokens, wrong_tokens])
    masks = torch.cat([attention_mask, attention_mask, wrong_mask])
    looked_at = [
        Projected.joined([own, wrong, own]) for own, wrong in zip(images, wrong_images, strict=True)
    ]
    fused = student.fuse(texts, masks, looked_at, torch.cat(keys) if keys else None)
    matched, wrong_image, wrong_text = student.itm_head(fused[:, 0]).chunk(3)
    return matched, wrong_image, wrong_text


def itm_labels(num_pairs: int, device: torch.device) -> Int[Tensor, " M"]:
    """Label true pairs 1, and then texts with a wrong image and images with a wrong text 0."""
    return (torch.arange(3 * num_pairs, device=device) < num_pairs).long()


def itm_loss(
    logits: Float[Tensor, "M 2"],
    labels: Int[Tensor, " M"],
    counts: Bool[Tensor, " M"],
    *,
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of matched or not (equation 4): the sum of the rows that count over `count`.

    That is how many they are, or how many a worker has on average.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * counts).sum() / count
