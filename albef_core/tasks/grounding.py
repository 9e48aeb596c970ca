"""Grounding: which part of a picture a caption, or one of its words, speaks of.

Weakly supervised: no box is ever learned from. The model is fine-tuned on pairs of images and texts
by `albef_core.tasks.retrieval.retrieval_step`, and then asked by Grad-CAM (Selvaraju et al. 2017,
arXiv 1610.02391) which of its attention to the image speaks for the match (ALBEF section 5).
`albef_core.metrics` scores the maps.

Axes beside the package's own: G patches along a side of the picture, F maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.image_encoder import Block
from albef_core.model import ALBEF, unit
from albef_core.text_encoder import TextLayer


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where the heads of one layer look, and how much each look speaks for the match."""

    shares: Float[Tensor, "B H L K"]
    """Attention of each token to the image's tokens, [CLS] and patches: a row sums to 1."""
    gradient: Float[Tensor, "B H L K"]
    """Derivative of the match by each share."""

    def grad_cam(self) -> Float[Tensor, "B H L G G"]:
        """Weigh each patch's share by its gradient where that is positive, on the patches' grid."""
        weighed = (self.shares * self.gradient.clamp(min=0))[..., 1:]
        side = math.isqrt(weighed.shape[-1])
        return weighed.unflatten(-1, (side, side))

    def token_maps(self, *, head: int | None = None) -> Float[Tensor, "B L G G"]:
        """Give one map a token: the mean over the heads, or a single head's."""
        maps = self.grad_cam()
        return maps.mean(dim=1) if head is None else maps[:, head]


def itm_looks(
    model: ALBEF,
    images: Float[Tensor, "B 3 R R"],
    token_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
    *,
    layers: Sequence[int],
) -> tuple[list[Look], Float[Tensor, "B 2"]]:
    """Ask layers of the multimodal encoder what makes each text match the image in its row.

    What is derived is the raw ITM logit of "matched". Returns a look for each of `layers`, which
    count from 0 at the first with cross-attention, and the ITM logits. The model is in eval mode,
    and its own gradients are left alone.
    """
    with torch.no_grad():
        image_tokens, _ = model.encode_image(images)
        tokens, _ = model.encode_text(token_ids, attention_mask)
    shares: dict[int, Tensor] = {}
    tokens.requires_grad_()
    with torch.enable_grad():
        for number, layer in enumerate(model.multimodal_encoder.layers):
            assert isinstance(layer, TextLayer)
            if number in layers:
                tokens, shares[number] = layer.look(tokens, attention_mask, image_tokens)
            else:
                tokens = layer(tokens, attention_mask, image_tokens)
        logits = model.itm_head(tokens[:, 0])
        looks = _looks(logits[:, 1].sum(), [shares[number] for number in layers])
    return looks, logits.detach()


def itc_looks(
    model: ALBEF,
    images: Float[Tensor, "B 3 R R"],
    token_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
    *,
    layers: Sequence[int],
) -> tuple[list[Look], Float[Tensor, "B B"]]:
    """Ask blocks of the image encoder what makes each image similar to the text in its row.

    The multimodal encoder takes no part. What is derived is the cosine over the temperature.
    Returns a look for each of `layers`, which count from 0, and all similarities, a row an image.
    One look at full size takes 32 MB a pair. The model is in eval mode, and its own gradients are
    left alone.
    """
    encoder, first = model.image_encoder, min(layers)
    with torch.no_grad():
        _, text_features = model.encode_text(token_ids, attention_mask)
        tokens = encoder.embed(images)
        for block in encoder.blocks[:first]:
            tokens = block(tokens)
    shares: dict[int, Tensor] = {}
    tokens.requires_grad_()
    with torch.enable_grad():
        for number, block in enumerate(encoder.blocks[first:], first):
            assert isinstance(block, Block)
            if number in layers:
                tokens, shares[number] = block.look(tokens)
            else:
                tokens = block(tokens)
        image_features = unit(model.image_projection(encoder.norm(tokens)[:, 0]))
        similarity = image_features @ text_features.T / model.temperature
        looks = _looks(similarity.diagonal().sum(), [shares[number] for number in layers])
    return looks, similarity.detach()


def _looks(match: Float[Tensor, ""], shares: list[Tensor]) -> list[Look]:
    gradients = torch.autograd.grad(match, shares)
    return [
        Look(shares=share.detach(), gradient=gradient)
        for share, gradient in zip(shares, gradients, strict=True)
    ]


def itm_maps(
    look: Look, attention_mask: Bool[Tensor, "B L"], *, head: int | None = None
) -> Float[Tensor, "B G G"]:
    """Give one map a caption: the mean over its tokens, of all heads or of one.

    Padding adds nothing but is counted, as published: maps are compared within one picture, where a
    common factor changes no choice.
    """
    return (look.token_maps(head=head) * attention_mask[..., None, None]).mean(dim=1)


def itc_maps(look: Look, *, head: int | None = None) -> Float[Tensor, "B G G"]:
    """Give one map a picture: where the image's [CLS] token looks, with all heads or with one."""
    return look.token_maps(head=head)[:, 0]


def enlarge(
    maps: Float[Tensor, "F G G"], *, height: int, width: int
) -> Float[Tensor, "F {height} {width}"]:
    """Resize maps to the picture's own pixels, bicubic as published; it may dip below 0."""
    return F.interpolate(maps[:, None], size=(height, width), mode="bicubic")[:, 0]
