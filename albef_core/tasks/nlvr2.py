"""NLVR2: is the sentence true of the two images? (ALBEF section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.batch import Share
from albef_core.config import ModelConfig, Recipe
from albef_core.image_encoder import ImageEncoder
from albef_core.pair_encoder import PairEncoder, in_pairs
from albef_core.precision import full_precision
from albef_core.pretraining import Place
from albef_core.tasks.classification import ClassificationStep, distilled_step, two_layer_head
from albef_core.tasks.labels import NLVR2_LABELS
from albef_core.teacher import frozen_copy
from albef_core.text_encoder import TextEncoder
from albef_core.weights import WeightsReport, apply_weights

OF_PRETRAINING = (
    "image_projection.",
    "text_projection.",
    "itm_head.",
    "mlm_head.",
    "assignment_head.",
    "temperature",
    "queues.",
    "teacher.",
)


@dataclass(frozen=True, kw_only=True)
class Nlvr2Batch(Share):
    """Sentences, each about two images: `images` is (B, 2, 3, R, R), the first and the second."""

    token_ids: Int[Tensor, "B L"]
    """Sentences, padded with id 0 where the mask is False."""
    attention_mask: Bool[Tensor, "B L"]
    """True on every token that is not padding."""
    labels: Int[Tensor, " B"]
    """Places in `NLVR2_LABELS`."""


class Nlvr2Model(nn.Module):
    """The encoders, the multimodal one in pairs, and a two-layer head over the fused [CLS]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = PairEncoder(config)
        self.classifier = two_layer_head(config.text_width, num_classes=len(NLVR2_LABELS))

    def forward(
        self,
        images: Float[Tensor, "B 2 3 R R"],
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 2"]:
        """Give a logit for each of `NLVR2_LABELS`; `keys` fix each row's dropout."""
        fused = self.fuse(images, token_ids, attention_mask, keys)
        return self.classifier(fused[:, 0])

    def fuse(
        self,
        images: Float[Tensor, "B 2 3 R R"],
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Let each sentence look at its two images."""
        text_tokens = self.text_encoder(token_ids, attention_mask, keys)
        first, second = self.image_encoder(images.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return self.multimodal_encoder(text_tokens, attention_mask, first, second, keys)


def start_nlvr2(
    student: Nlvr2Model, pretrained: Mapping[str, Tensor], *, source: str, recipe: Recipe
) -> tuple[Nlvr2Model, WeightsReport]:
    """Start a student from pre-trained weights, and make its teacher.

    Weights of text assignment are taken as they are; of a pre-trained ALBEF each fusion layer
    becomes a pair. The teacher is a copy of the student, made after the weights are loaded with
    `recipe.loaded_teacher`, and before it in the published code.

    Args:
        student: a fresh model; its weights are overwritten.
        pretrained: a pre-trained ALBEF or a model of text assignment by our names, as
            `read_official` gives them.
        source: where the weights are from, for the report and for errors.
        recipe: which flaws of the published code are mended.

    Raises:
        InputError: the weights do not fit the model.
    """
    unloaded = frozen_copy(student)
    is_paired = "assignment_head.weight" in pretrained
    report = apply_weights(
        student,
        pretrained if is_paired else in_pairs(pretrained),
        source=source,
        may_miss=("classifier.",),
        may_add=OF_PRETRAINING,
    )
    return frozen_copy(student) if recipe.loaded_teacher else unloaded, report


def nlvr2_step(
    student: Nlvr2Model,
    teacher: Nlvr2Model,
    batch: Nlvr2Batch,
    *,
    alpha: float,
    seed: int = 0,
    micro_batch_size: int | None = None,
) -> ClassificationStep:
    """Classify with momentum distillation (ALBEF sections 3.3 and 4).

    Moves nothing: before it, the caller lets the teacher follow. With several workers `batch` is
    this worker's share, and the mean of the workers' losses is the loss of the global batch.

    Args:
        student: the model that learns.
        teacher: its moving average.
        batch: rows of this worker.
        alpha: weight of the teacher's soft targets now; 0 is training without distillation.
        seed: of this step's dropout.
        micro_batch_size: rows whose activations are held at once; the gradient stays the same.
    """
    place = Place(batch, seed=seed, micro_batch_size=micro_batch_size)
    rows = batch.images, batch.token_ids, batch.attention_mask
    return distilled_step(student, teacher, *rows, labels=batch.labels, place=place, alpha=alpha)


@torch.inference_mode()
def verify(
    model: Nlvr2Model,
    images: Float[Tensor, "B 2 3 R R"],
    token_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
) -> Float[Tensor, " B"]:
    """Give the probability that each sentence is true of its images; the model is in eval mode."""
    return full_precision(model(images, token_ids, attention_mask)).softmax(dim=1)[:, 1]
