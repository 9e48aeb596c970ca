"""One pre-training step, top to bottom as in section 3.2 of the paper."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.batch import PairBatch, RetrievalBatch, Share
from albef_core.chunks import in_chunks
from albef_core.config import Recipe
from albef_core.distributed import (
    fetch_rows,
    gather_rows,
    is_distributed,
    mean_over_workers,
    own_share,
    world_size,
)
from albef_core.feature_queue import FeatureQueue, Queues
from albef_core.keyed import Stream, row_keys, uniforms
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF, Encoders
from albef_core.objectives.itc import Keys, gather_keys, itc_loss, itc_targets, similarities
from albef_core.objectives.itm import (
    Negatives,
    draw_hard_negatives,
    itm_labels,
    itm_loss,
    match_pairs,
    negative_weights,
)
from albef_core.objectives.mlm import mlm_loss
from albef_core.outcome import Itc, Itm, Mlm, PretrainingStep, RetrievalStep
from albef_core.precision import full_precision
from albef_core.teacher import Teacher
from albef_core.text_encoder import Projected

Sampler = Callable[[Float[Tensor, "B C"], Float[Tensor, " B"]], Int[Tensor, " B"]]
"""Draws one hard negative a row from its weights with a number of [0, 1); called for the images
first, then for the texts."""


def pretraining_step(
    student: ALBEF,
    teacher: Teacher,
    queues: Queues,
    batch: PairBatch,
    *,
    alpha: float,
    recipe: Recipe,
    seed: int = 0,
    micro_batch_size: int | None = None,
    draw: Sampler = draw_hard_negatives,
) -> PretrainingStep:
    """Align the two encoders (ITC), then fuse them (ITM, MLM): ALBEF section 3.2.

    Reads the queues as they were and moves nothing: before it, the caller clamps the temperature
    and lets the teacher follow; after it, the caller pushes the teacher's features and steps the
    optimizer. With several workers `batch` is this worker's share, and losses are its part of the
    global ones: their mean over workers is the loss of the global batch.

    Args:
        student: the model that learns.
        teacher: its moving average.
        queues: earlier features of the teacher.
        batch: pairs of this worker.
        alpha: weight of the teacher's soft targets now.
        recipe: which flaws of the published code are mended.
        seed: of this step's random choices, which depend on it and the pair's place alone.
        micro_batch_size: pairs whose activations are held at once; the gradient stays the same.
        draw: replaces how hard negatives are drawn.
    """
    place = Place(batch, seed=seed, micro_batch_size=micro_batch_size)
    views = encode(student, teacher, batch, place)
    itc = contrast(student, queues, views, batch, place, alpha=alpha, recipe=recipe)
    itm = match(student, views, itc, batch, place, recipe=recipe, draw=draw)
    mlm = fill_in(student, teacher, views, batch, place, alpha=alpha, recipe=recipe)
    return PretrainingStep(
        itc=itc,
        itm=itm,
        mlm=mlm,
        image_features=views.image_features,
        text_features=views.text_features,
        teacher_image_features=views.teacher_image_features,
        teacher_text_features=views.teacher_text_features,
        image_ids=batch.image_ids,
    )


def push_step(queues: Queues, step: RetrievalStep, *, num_pairs: int) -> None:
    """Put a step's teacher features of all workers, `num_pairs` rows, into the queues.

    A collective: every worker calls it, once a step, after the losses.
    """
    queues.push(
        gather_rows(step.teacher_image_features, num_pairs=num_pairs),
        gather_rows(step.teacher_text_features, num_pairs=num_pairs),
        gather_rows(step.image_ids, num_pairs=num_pairs),
    )


class Place:
    """Where this worker's rows stand in the global batch, and what follows from it."""

    def __init__(self, batch: Share, *, seed: int, micro_batch_size: int | None) -> None:
        self.total, self.own = batch.total, own_share(batch.total)
        assert len(self.own) == len(batch), "every worker holds its share of the global batch"
        self.rows = torch.arange(self.own.start, self.own.stop, device=batch.images.device)
        self.seed, self.micro_batch_size = seed, micro_batch_size
        self.is_whole = micro_batch_size is None or micro_batch_size >= len(batch)

    def keys(self, stream: Stream) -> Int[Tensor, " B"]:
        """Key the random numbers of each row."""
        return row_keys(self.rows, seed=self.seed, stream=stream)

    def chunks(self, function: Callable[..., Any], *rows: Tensor) -> Any:
        """Apply a function to a micro-batch at a time."""
        return in_chunks(function, *rows, size=self.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the encoders make of the batch's images and captions before any fusion."""

    image_tokens: Float[Tensor, "B K I"]
    text_tokens: Float[Tensor, "B L W"]
    image_features: Float[Tensor, "B D"]
    text_features: Float[Tensor, "B D"]
    teacher_image_tokens: Float[Tensor, "B K I"]
    teacher_image_features: Float[Tensor, "B D"]
    teacher_text_features: Float[Tensor, "B D"]
    looked_at: list[Projected] | None
    """Keys and values of the images in every fusion layer, which ITM and MLM share. None where
    micro-batches are to hold little, and make their own."""


def encode(student: ALBEF, teacher: Teacher, batch: RetrievalBatch, place: Place) -> Views:
    """Encode images and captions, by the student and by the teacher (section 3.1)."""
    captions = batch.token_ids, batch.attention_mask
    image_tokens, image_features = place.chunks(student.encode_image, batch.images)
    text_tokens, text_features = place.chunks(
        student.encode_text, *captions, place.keys(Stream.TEXT)
    )
    with torch.no_grad():
        teacher_image_tokens, teacher_image_features = place.chunks(
            teacher.encode_image, batch.images
        )
        _, teacher_text_features = place.chunks(
            teacher.encode_text, *captions, place.keys(Stream.TEACHER_TEXT)
        )
    return Views(
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        image_features=image_features,
        text_features=text_features,
        teacher_image_tokens=teacher_image_tokens,
        teacher_image_features=teacher_image_features,
        teacher_text_features=teacher_text_features,
        looked_at=student.project(image_tokens) if place.is_whole else None,
    )


def contrast(
    student: ALBEF,
    queues: Queues,
    views: Views,
    batch: RetrievalBatch,
    place: Place,
    *,
    alpha: float,
    recipe: Recipe,
) -> Itc:
    """Image-text contrast, against the teacher's view of the batch and of the recent past."""

    def keys(features: Float[Tensor, "B D"], queue: FeatureQueue) -> Keys:
        candidates, ids, queries = features, batch.image_ids, range(len(batch))
        if recipe.global_keys:
            candidates = gather_rows(features, num_pairs=place.total)
            ids, queries = gather_rows(ids, num_pairs=place.total), place.own
        by_id = recipe.image_id_positives
        return gather_keys(candidates, ids, queue, queries=queries, image_id_positives=by_id)

    texts = keys(views.teacher_text_features, queues.text)
    images = keys(views.teacher_image_features, queues.image)
    i2t = similarities(views.image_features, texts, student.temperature)
    t2i = similarities(views.text_features, images, student.temperature)
    with torch.no_grad():
        teacher_i2t = similarities(views.teacher_image_features, texts, student.temperature)
        teacher_t2i = similarities(views.teacher_text_features, images, student.temperature)
        i2t_targets = itc_targets(teacher_i2t, texts.is_positive, alpha=alpha)
        t2i_targets = itc_targets(teacher_t2i, images.is_positive, alpha=alpha)
    count = place.total / world_size()
    i2t_loss = itc_loss(i2t, i2t_targets, count=count)
    t2i_loss = itc_loss(t2i, t2i_targets, count=count)
    return Itc(
        loss=(i2t_loss + t2i_loss) / 2,
        i2t_loss=i2t_loss,
        t2i_loss=t2i_loss,
        i2t=i2t,
        t2i=t2i,
        teacher_i2t=teacher_i2t,
        teacher_t2i=teacher_t2i,
        i2t_targets=i2t_targets,
        t2i_targets=t2i_targets,
        is_positive=texts.is_positive,
    )


def match(
    student: ALBEF,
    views: Views,
    itc: Itc,
    batch: RetrievalBatch,
    place: Place,
    *,
    recipe: Recipe,
    draw: Sampler,
) -> Itm:
    """Image-text matching, on the pairs that the contrast finds hard to tell apart."""
    is_global = recipe.negatives == "global"
    candidates = range(place.total) if is_global else range(len(batch))
    if recipe.global_keys and not is_global:
        candidates = place.own
    columns = slice(candidates.start, candidates.stop)
    same_image = itc.is_positive[:, columns]
    with torch.no_grad():
        guard = recipe.guard_empty
        image_weights = negative_weights(itc.t2i[:, columns], same_image, guard_empty=guard)
        text_weights = negative_weights(itc.i2t[:, columns], same_image, guard_empty=guard)
        drawn_images = draw(image_weights, uniforms(place.keys(Stream.IMAGE_DRAW)))
        drawn_texts = draw(text_weights, uniforms(place.keys(Stream.TEXT_DRAW)))

    def fetch(rows: Float[Tensor, " B *N"], drawn: Int[Tensor, " B"]) -> Float[Tensor, " B *N"]:
        return fetch_rows(rows, drawn, num_pairs=place.total) if is_global else rows[drawn]

    negatives = Negatives(
        images=candidates.start + drawn_images,
        texts=candidates.start + drawn_texts,
        exist=~same_image.all(dim=1),
    )

    texts = (
        views.text_tokens,
        batch.attention_mask,
        fetch(views.text_tokens, drawn_texts),
        fetch(batch.attention_mask.to(views.text_tokens.dtype), drawn_texts).bool(),
        *(place.keys(s) for s in (Stream.MATCHED, Stream.WRONG_IMAGE, Stream.WRONG_TEXT)),
    )
    if views.looked_at is None:
        wrong_images = fetch(views.image_tokens, drawn_images)
        pairs = views.image_tokens, wrong_images, *texts
        logits = place.chunks(partial(match_pairs, student), *pairs)
    elif is_global and is_distributed():  # tokens travel: keys and values are 12 times as much
        wrong_images = fetch(views.image_tokens, drawn_images)
        logits = match_pairs(student, views.looked_at, wrong_images, *texts)
    else:
        wrong = [images.rows(drawn_images) for images in views.looked_at]
        logits = match_pairs(student, views.looked_at, wrong, *texts)
    logits = full_precision(torch.cat(logits))
    labels = itm_labels(len(batch), logits.device)
    counts = torch.cat([torch.ones_like(negatives.exist), negatives.exist, negatives.exist])
    return Itm(
        loss=itm_loss(logits, labels, counts, count=mean_over_workers(counts.sum().to(logits))),
        logits=logits,
        labels=labels,
        counts=counts,
        negatives=negatives,
        image_weights=image_weights,
        text_weights=text_weights,
    )


def fill_in(
    student: ALBEF,
    teacher: Teacher,
    views: Views,
    batch: PairBatch,
    place: Place,
    *,
    alpha: float,
    recipe: Recipe,
) -> Mlm:
    """Masked words, read off the image."""

    def fused(
        model: Encoders,
        masked_ids: Int[Tensor, "M L"],
        attention_mask: Bool[Tensor, "M L"],
        images: Float[Tensor, "M K I"] | list[Projected],
        keys: Int[Tensor, " M"],
    ) -> Float[Tensor, "M L W"]:
        tokens, _ = model.encode_text(masked_ids, attention_mask, keys)
        return model.fuse(tokens, attention_mask, images, keys)

    is_scored = batch.mlm_labels != NOT_SCORED
    masked = batch.masked_ids, batch.attention_mask
    keys = place.keys(Stream.MASKED)
    if views.looked_at is None:
        words = place.chunks(partial(fused, student), *masked, views.image_tokens, keys)
    else:
        words = fused(student, *masked, views.looked_at, keys)
    logits = full_precision(student.mlm_head(words[is_scored]))
    with torch.no_grad():
        teacher_words = place.chunks(
            partial(fused, teacher),
            *masked,
            views.teacher_image_tokens,
            place.keys(Stream.TEACHER_MASKED),
        )
        teacher_logits = full_precision(teacher.mlm_head(teacher_words[is_scored]))
    num_scored = is_scored.sum().to(logits)
    losses = mlm_loss(
        logits,
        teacher_logits,
        batch.mlm_labels[is_scored],
        alpha=alpha,
        count=mean_over_workers(num_scored) if recipe.global_mlm_mean else num_scored,
        guard_empty=recipe.guard_empty,
    )
    return Mlm(losses=losses, logits=logits, teacher_logits=teacher_logits)
