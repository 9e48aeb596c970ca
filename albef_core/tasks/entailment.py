"""Visual entailment: does the text follow from the image? Three classes (ALBEF section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.batch import Share
from albef_core.config import ModelConfig
from albef_core.image_encoder import ImageEncoder
from albef_core.precision import full_precision
from albef_core.pretraining import Place
from albef_core.tasks.classification import ClassificationStep, distilled_step, two_layer_head
from albef_core.tasks.labels import ENTAILMENT_LABELS
from albef_core.teacher import frozen_copy
from albef_core.text_encoder import MultimodalEncoder, TextEncoder
from albef_core.weights import WeightsReport, apply_weights

OF_PRETRAINING = (
    "image_projection.",
    "text_projection.",
    "itm_head.",
    "mlm_head.",
    "temperature",
    "queues.",
)


@dataclass(frozen=True, kw_only=True)
class EntailmentBatch(Share):
    """Images with a text each, and what the text is to the image."""

    token_ids: Int[Tensor, "B L"]
    """Texts, padded with id 0 where the mask is False."""
    attention_mask: Bool[Tensor, "B L"]
    """True on every token that is not padding."""
    labels: Int[Tensor, " B"]
    """Places in `ENTAILMENT_LABELS`."""


class EntailmentModel(nn.Module):
    """ALBEF's three encoders, and a two-layer head over the fused [CLS]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = MultimodalEncoder(config)
        self.classifier = two_layer_head(config.text_width, num_classes=len(ENTAILMENT_LABELS))

    def forward(
        self,
        images: Float[Tensor, "B 3 R R"],
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 3"]:
        """Give a logit for each of `ENTAILMENT_LABELS`; `keys` fix each row's dropout."""
        text_tokens = self.text_encoder(token_ids, attention_mask, keys)
        image_tokens = self.image_encoder(images)
        fused = self.multimodal_encoder(text_tokens, attention_mask, image_tokens, keys)
        return self.classifier(fused[:, 0])


def start_entailment(
    student: EntailmentModel, pretrained: Mapping[str, Tensor], *, source: str
) -> tuple[EntailmentModel, WeightsReport]:
    """Start a student from pre-trained weights, and make its teacher.

    The encoders of the teacher start from the pre-trained teacher where the weights hold one
    (`teacher.` names), else from the student's; its head is the student's, which starts at random.

    Args:
        student: a fresh model; its weights are overwritten.
        pretrained: a pre-trained ALBEF by our names, as `read_official` gives it.
        source: where the weights are from, for the report and for errors.

    Raises:
        InputError: the weights do not fit the model.
    """
    teacher = frozen_copy(student)
    has_teacher = any(name.startswith("teacher.") for name in pretrained)
    started = nn.ModuleDict(dict(student.named_children()))
    if has_teacher:
        started["teacher"] = teacher
    report = apply_weights(
        started, pretrained, source=source, may_miss=("classifier.",), may_add=OF_PRETRAINING
    )
    if not has_teacher:
        teacher = frozen_copy(student)
    return teacher, report


def entailment_step(
    student: EntailmentModel,
    teacher: EntailmentModel,
    batch: EntailmentBatch,
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
def entail(
    model: EntailmentModel,
    images: Float[Tensor, "B 3 R R"],
    token_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
) -> Float[Tensor, "B 3"]:
    """Give the probability of each of `ENTAILMENT_LABELS`; the model is in eval mode."""
    return full_precision(model(images, token_ids, attention_mask)).softmax(dim=1)
