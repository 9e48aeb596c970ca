"""Image-text retrieval: its fine-tuning; compare everything by ITC, then judge the best by ITM.

Axes beside the package's own: I images, T texts, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.batch import RetrievalBatch
from albef_core.config import Recipe
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.objectives.itm import draw_hard_negatives
from albef_core.outcome import RetrievalStep
from albef_core.pretraining import Place, Sampler, contrast, encode, match
from albef_core.teacher import Teacher

OnPairs = Callable[[int, int], None]


def retrieval_step(
    student: ALBEF,
    teacher: Teacher,
    queues: Queues,
    batch: RetrievalBatch,
    *,
    alpha: float,
    recipe: Recipe,
    seed: int = 0,
    micro_batch_size: int | None = None,
    draw: Sampler = draw_hard_negatives,
) -> RetrievalStep:
    """Fine-tune for retrieval: pre-training's ITC and ITM, without MLM (ALBEF section 4).

    Grounding is weakly supervised, from pairs alone and without boxes: the same step trains it.

    Positives go by image id whatever the recipe says, in the batch and in the queue, because the
    published fine-tuning has ids too. What moves is the caller's matter, as in `pretraining_step`:
    the teacher follows before, the queues are pushed and the optimizer steps after. Only the clamp
    of the temperature is missing from the published code of this task; a caller that leaves it out
    agrees with it exactly. The MLM head takes no part and gets no gradient.

    Args:
        student: the model that learns.
        teacher: its moving average.
        queues: earlier features of the teacher, with the ids of their images.
        batch: pairs of this worker.
        alpha: weight of the teacher's soft targets now; 0 is fine-tuning without distillation.
        recipe: which flaws of the published code are mended.
        seed: of this step's random choices, which depend on it and the pair's place alone.
        micro_batch_size: pairs whose activations are held at once; the gradient stays the same.
        draw: replaces how hard negatives are drawn.
    """
    recipe = replace(recipe, image_id_positives=True)
    place = Place(batch, seed=seed, micro_batch_size=micro_batch_size)
    views = encode(student, teacher, batch, place)
    itc = contrast(student, queues, views, batch, place, alpha=alpha, recipe=recipe)
    itm = match(student, views, itc, batch, place, recipe=recipe, draw=draw)
    return RetrievalStep(
        itc=itc,
        itm=itm,
        image_features=views.image_features,
        text_features=views.text_features,
        teacher_image_features=views.teacher_image_features,
        teacher_text_features=views.teacher_text_features,
        image_ids=batch.image_ids,
    )


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
