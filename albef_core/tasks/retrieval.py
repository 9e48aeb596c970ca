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
BLOCK_BYTES = 256 * 2**20
"""Keys and values that ITM holds at once: those of twelve images at full size (384 px, float32).

With the paper's 128 candidates these meet thousands of captions, enough for batches of one length;
beside the tokens of all images it is little, on a GPU too.
"""


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

    Images go through in blocks: a block's keys and values are made once, not once a pair, and its
    pairs are fused by the length of their texts, so that next to no padding is computed. At most
    `batch_size` pairs, and `BLOCK_BYTES` of keys and values, are in memory at a time. `on_pairs`
    hears how many are done and wanted.
    """
    logits = texts.tokens.new_empty(len(pairs), 2)
    encoder, lengths = model.multimodal_encoder, texts.attention_mask.sum(dim=1)
    num_numbers = 2 * len(encoder.layers) * images.tokens.shape[1] * texts.tokens.shape[2]
    per_block = max(1, BLOCK_BYTES // (num_numbers * images.tokens.element_size()))
    shown, place = pairs[:, 0].unique(return_inverse=True)
    block = place // per_block
    by_length = (block * (1 + texts.tokens.shape[1]) + lengths[pairs[:, 1]]).argsort(stable=True)
    longest = lengths[pairs[by_length, 1]].tolist()  # once: the loop below never waits for a GPU
    num_done = 0
    for number, rows_of_block in enumerate(by_length.split(block.bincount().tolist())):
        first = number * per_block
        projected = encoder.project(images.tokens[shown[first : first + per_block]])
        for rows in rows_of_block.split(batch_size):
            num_done += len(rows)
            text, length = pairs[rows, 1], longest[num_done - 1]  # the last is the longest
            tokens, mask = texts.tokens[text, :length], texts.attention_mask[text, :length]
            fused = encoder.fuse(tokens, mask, projected, place[rows] - first)
            logits[rows] = model.itm_head(fused[:, 0])
            on_pairs(num_done, len(pairs))
    return logits


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
    pairs = wanted_pairs(similarity, top_k=top_k)
    logits = itm_logits(model, images, texts, pairs, batch_size=batch_size, on_pairs=on_pairs)
    matched = torch.full_like(similarity, torch.nan)
    matched[tuple(pairs.T)] = logits[:, 1]
    return rank_judged(similarity, matched, top_k=top_k)


def wanted_pairs(similarity: Float[Tensor, "I T"], *, top_k: int) -> Int[Tensor, "P 2"]:
    """List the pairs that re-ranking judges: each query's `top_k`, one wanted both ways once."""
    for_text = candidates(similarity, top_k=top_k, dim=1)
    return (for_text | candidates(similarity, top_k=top_k, dim=0)).nonzero()


def rank_judged(
    similarity: Float[Tensor, "I T"], matched: Float[Tensor, "I T"], *, top_k: int
) -> RetrievalScores:
    """Put each query's `top_k` first, by `matched`, and the others below them, by `similarity`.

    `matched` is NaN where nothing was judged; that must be what `wanted_pairs` gives for this
    `top_k` or a larger one, so that judging once serves every smaller k.
    """
    # Of two candidates equally similar, the k-th and the next, the one that was judged.
    similarity_of_judged = similarity.masked_fill(matched.isnan(), -torch.inf)
    for_text, for_image = (candidates(similarity_of_judged, top_k=top_k, dim=dim) for dim in (1, 0))
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
    # Doubles, so that shifting the similarities below the logits cannot merge two of them.
    matched = matched.double()
    lowest = matched.masked_fill(~is_judged, torch.inf).amin(dim=dim, keepdim=True)
    # Cosines lie within 2 of each other: 3 puts the highest of them below the lowest logit.
    return torch.where(is_judged, matched, lowest - 3 + similarity.double())
