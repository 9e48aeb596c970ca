"""One pre-training step, top to bottom as in section 3.2 of the paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, Recipe
from albef_core.distributed import rows_of_others
from albef_core.feature_queue import FeatureQueue
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF
from albef_core.objectives.itc import Keys, gather_keys, itc_loss, itc_targets, similarities
from albef_core.objectives.itm import (
    Negatives,
    itm_labels,
    itm_loss,
    match_pairs,
    negative_weights,
    sample_hard_negatives,
)
from albef_core.objectives.mlm import MlmLosses, mlm_loss
from albef_core.precision import full_precision
from albef_core.teacher import Teacher

Sampler = Callable[[Float[Tensor, "B B"]], Int[Tensor, " B"]]
"""Draws one hard negative a row from its weights; called for the images first, then for the
texts."""


class Queues(nn.Module):
    """The two rings of teacher features: of images and of texts."""

    def __init__(
        self, model: ModelConfig, objective: ObjectiveConfig, recipe: Recipe, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.image = FeatureQueue(objective.num_slots, model.feature_size)
        self.text = FeatureQueue(objective.num_slots, model.feature_size)
        if not recipe.empty_queue:
            generator = torch.Generator().manual_seed(seed)
            self.image.fill_randomly(generator)
            self.text.fill_randomly(generator)

    def push(
        self,
        image_features: Float[Tensor, "B D"],
        text_features: Float[Tensor, "B D"],
        image_ids: Int[Tensor, " B"],
    ) -> None:
        """Store a batch's teacher features; once a step, after the losses."""
        self.image.push(image_features, image_ids)
        self.text.push(text_features, image_ids)


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


@dataclass(frozen=True, kw_only=True)
class Itm:
    """What the matching of a batch gives: the loss, the draws, and the matrices behind them."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "M 2"]
    labels: Int[Tensor, " M"]
    counts: Bool[Tensor, " M"]
    negatives: Negatives
    image_weights: Float[Tensor, "B B"]
    text_weights: Float[Tensor, "B B"]


@dataclass(frozen=True, kw_only=True)
class Mlm:
    """What the filling-in of a batch gives: the losses and the logits at the N masked tokens."""

    losses: MlmLosses
    logits: Float[Tensor, "N V"]
    teacher_logits: Float[Tensor, "N V"]


@dataclass(frozen=True, kw_only=True)
class PretrainingStep:
    """The losses of one batch, and all that tests, curves and pictures want to know of it."""

    itc: Itc
    itm: Itm
    mlm: Mlm
    image_features: Float[Tensor, "B D"]
    text_features: Float[Tensor, "B D"]
    teacher_image_features: Float[Tensor, "B D"]
    teacher_text_features: Float[Tensor, "B D"]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """ITC + ITM + MLM (equation 5)."""
        return self.itc.loss + self.itm.loss + self.mlm.losses.total


def pretraining_step(
    student: ALBEF,
    teacher: Teacher,
    queues: Queues,
    batch: PairBatch,
    *,
    alpha: float,
    recipe: Recipe,
    draw: Sampler = sample_hard_negatives,
) -> PretrainingStep:
    """Align the two encoders (ITC), then fuse them (ITM, MLM): ALBEF section 3.2.

    Reads the queues as they were and moves nothing: before it, the caller clamps the temperature
    and lets the teacher follow; after it, the caller pushes the teacher's features and steps the
    optimizer.
    """
    image_tokens, image_features = student.encode_image(batch.images)
    text_tokens, text_features = student.encode_text(batch.token_ids, batch.attention_mask)
    with torch.no_grad():
        teacher_image_tokens, teacher_image_features = teacher.encode_image(batch.images)
        _, teacher_text_features = teacher.encode_text(batch.token_ids, batch.attention_mask)

    # Image-text contrast, against the teacher's view of the batch and of the recent past.
    def keys(features: Float[Tensor, "B D"], queue: FeatureQueue) -> Keys:
        elsewhere = (rows_of_others(features), rows_of_others(batch.image_ids))
        return gather_keys(
            features,
            queue,
            batch.image_ids,
            image_id_positives=recipe.image_id_positives,
            elsewhere=elsewhere if recipe.global_keys else None,
        )

    texts = keys(teacher_text_features, queues.text)
    images = keys(teacher_image_features, queues.image)
    i2t = similarities(image_features, texts, student.temperature)
    t2i = similarities(text_features, images, student.temperature)
    with torch.no_grad():
        teacher_i2t = similarities(teacher_image_features, texts, student.temperature)
        teacher_t2i = similarities(teacher_text_features, images, student.temperature)
        i2t_targets = itc_targets(teacher_i2t, texts.is_positive, alpha=alpha)
        t2i_targets = itc_targets(teacher_t2i, images.is_positive, alpha=alpha)
    i2t_loss, t2i_loss = itc_loss(i2t, i2t_targets), itc_loss(t2i, t2i_targets)
    itc = Itc(
        loss=(i2t_loss + t2i_loss) / 2,
        i2t_loss=i2t_loss,
        t2i_loss=t2i_loss,
        i2t=i2t,
        t2i=t2i,
        teacher_i2t=teacher_i2t,
        teacher_t2i=teacher_t2i,
        i2t_targets=i2t_targets,
        t2i_targets=t2i_targets,
    )

    # Image-text matching, on the pairs that the contrast finds hard to tell apart.
    num_pairs = len(batch)
    same_image = texts.is_positive[:, :num_pairs]
    with torch.no_grad():
        guard = recipe.guard_empty
        image_weights = negative_weights(t2i[:, :num_pairs], same_image, guard_empty=guard)
        text_weights = negative_weights(i2t[:, :num_pairs], same_image, guard_empty=guard)
        exist = ~same_image.all(dim=1)
        negatives = Negatives(images=draw(image_weights), texts=draw(text_weights), exist=exist)
    logits = full_precision(
        match_pairs(student, image_tokens, text_tokens, batch.attention_mask, negatives)
    )
    labels = itm_labels(num_pairs, logits.device)
    counts = torch.cat([torch.ones_like(exist), exist, exist])
    itm = Itm(
        loss=itm_loss(logits, labels, counts),
        logits=logits,
        labels=labels,
        counts=counts,
        negatives=negatives,
        image_weights=image_weights,
        text_weights=text_weights,
    )

    # Masked words, read off the image.
    is_scored = batch.mlm_labels != NOT_SCORED
    masked_tokens, _ = student.encode_text(batch.masked_ids, batch.attention_mask)
    fused = student.fuse(masked_tokens, batch.attention_mask, image_tokens)
    word_logits = full_precision(student.mlm_head(fused[is_scored]))
    with torch.no_grad():
        teacher_tokens, _ = teacher.encode_text(batch.masked_ids, batch.attention_mask)
        teacher_fused = teacher.fuse(teacher_tokens, batch.attention_mask, teacher_image_tokens)
        teacher_word_logits = full_precision(teacher.mlm_head(teacher_fused[is_scored]))
    mlm = Mlm(
        losses=mlm_loss(
            word_logits,
            teacher_word_logits,
            batch.mlm_labels[is_scored],
            alpha=alpha,
            guard_empty=recipe.guard_empty,
        ),
        logits=word_logits,
        teacher_logits=teacher_word_logits,
    )
    return PretrainingStep(
        itc=itc,
        itm=itm,
        mlm=mlm,
        image_features=image_features,
        text_features=text_features,
        teacher_image_features=teacher_image_features,
        teacher_text_features=teacher_text_features,
    )


class PretrainingModel(nn.Module):
    """The student behind one `forward`, which is what DistributedDataParallel averages."""

    def __init__(self, student: ALBEF) -> None:
        super().__init__()
        self.student = student

    def forward(self, *args: Any, **kwargs: Any) -> PretrainingStep:
        """Run `pretraining_step` on the student."""
        return pretraining_step(self.student, *args, **kwargs)
