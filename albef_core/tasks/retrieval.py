"""Image-text retrieval: compare everything by ITC, then look closely at the best by ITM.

Axes beside the package's own: I images, T texts, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.model import ALBEF

OnPairs = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """What the image encoder says about I images."""

    tokens: Float[Tensor, "I K W"]
    """Every token, for the multimodal encoder."""
    features: Float[Tensor, "I D"]
    """Unit vectors in the joint space."""


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """What the text encoder says about T texts."""

    tokens: Float[Tensor, "T L W"]
    """Every token, for the multimodal encoder."""
    attention_mask: Bool[Tensor, "T L"]
    """False on padding."""
    features: Float[Tensor, "T D"]
    """Unit vectors in the joint space."""


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Two matrices, a row an image: rank texts within a row, images within a column."""

    image_to_text: Float[Tensor, "I T"]
    text_to_image: Float[Tensor, "I T"]


@torch.inference_mode()
def encode_texts(
    model: ALBEF,
    token_ids: Int[Tensor, "T L"],
    attention_mask: Bool[Tensor, "T L"],
    *,
    batch_size: int,
) -> EncodedTexts:
    """Encode padded texts, `batch_size` at a time."""
    parts = [
        model.encode_text(ids, mask)
        for ids, mask in zip(
            token_ids.split(batch_size), attention_mask.split(batch_size), strict=True
        )
    ]
    tokens, features = (torch.cat(part) for part in zip(*parts, strict=True))
    return EncodedTexts(tokens=tokens, attention_mask=attention_mask, features=features)


def itc_similarity(images: EncodedImages, texts: EncodedTexts) -> Float[Tensor, "I T"]:
    """Give the cosine of each image with each text, -1 to 1 (ALBEF section 3.2)."""
    return images.features @ texts.features.T


@torch.inference_mode()
def itm_logits(
    model: ALBEF,
    images: EncodedImages,
    texts: EncodedTexts,
    pairs: Int[Tensor, "P 2"],
    *,
    batch_size: int,
    on_pairs: OnPairs = lambda num_done, num_wanted: None,
) -> Float[Tensor, "P 2"]:
    """Let the matching head judge pairs of (image, text) positions; class 1 is a match.

    At most `batch_size` pairs are in memory at a time. `on_pairs` hears how many are done and
    wanted.
    """
    logits = [torch.empty(0, 2, device=texts.tokens.device, dtype=texts.tokens.dtype)]
    num_done = 0
    for batch in pairs.split(batch_size):
        image, text = batch.unbind(dim=1)
        mask = texts.attention_mask[text]
        length = int(mask.sum(dim=1).max())  # captions end before the longest of all of them does
        fused = model.fuse(texts.tokens[text, :length], mask[:, :length], images.tokens[image])
        logits.append(model.itm_head(fused[:, 0]))
        num_done += len(batch)
        on_pairs(num_done, len(pairs))
    return torch.cat(logits)


def candidates(similarity: Float[Tensor, "I T"], *, top_k: int, dim: int) -> Bool[Tensor, "I T"]:
    """Mark each query's `top_k`: with dim 1 texts for an image, with dim 0 images for a text."""
    best = similarity.topk(min(top_k, similarity.shape[dim]), dim=dim).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, best, True)


def rerank(
    model: ALBEF,
    images: EncodedImages,
    texts: EncodedTexts,
    *,
    top_k: int,
    batch_size: int,
    on_pairs: OnPairs = lambda num_done, num_wanted: None,
) -> RetrievalScores:
    """Re-rank each query's `top_k` most similar candidates by ITM (ALBEF section 5).

    The score is the raw logit of "matched", as in the published evaluation. Candidates outside the
    top k come after all those inside and keep their order by ITC; the published code gives all of
    them -100, a tie that leaves their order to the sorting routine. A pair wanted in both
    directions is fused once.
    """
    similarity = itc_similarity(images, texts)
    for_text = candidates(similarity, top_k=top_k, dim=1)
    for_image = candidates(similarity, top_k=top_k, dim=0)
    wanted = for_text | for_image
    logits = itm_logits(
        model, images, texts, wanted.nonzero(), batch_size=batch_size, on_pairs=on_pairs
    )
    # Doubles, so that shifting the similarities below the logits cannot merge two of them.
    matched = torch.zeros_like(similarity, dtype=torch.float64)
    matched[wanted] = logits[:, 1].double()
    return RetrievalScores(
        image_to_text=_put_below(matched, similarity, is_judged=for_text, dim=1),
        text_to_image=_put_below(matched, similarity, is_judged=for_image, dim=0),
    )


def _put_below(
    matched: Float[Tensor, "I T"],
    similarity: Float[Tensor, "I T"],
    *,
    is_judged: Bool[Tensor, "I T"],
    dim: int,
) -> Float[Tensor, "I T"]:
    lowest = matched.masked_fill(~is_judged, torch.inf).amin(dim=dim, keepdim=True)
    # Cosines lie within 2 of each other: 3 puts the highest of them below the lowest logit.
    return torch.where(is_judged, matched, lowest - 3 + similarity.double())
