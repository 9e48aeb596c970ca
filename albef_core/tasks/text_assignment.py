"""Text assignment: to which of two images does the text belong, or to neither? (ALBEF section 4).

One more step of pre-training, on image-caption pairs, that makes a model ready for NLVR2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, Recipe
from albef_core.distributed import fetch_rows, gather_rows, mean_over_workers
from albef_core.image_encoder import ImageEncoder
from albef_core.keyed import Stream, uniforms
from albef_core.objectives.itm import draw_hard_negatives, negative_weights
from albef_core.pair_encoder import PairEncoder, in_pairs
from albef_core.precision import full_precision, no_autocast
from albef_core.pretraining import Place
from albef_core.text_encoder import TextEncoder
from albef_core.weights import WeightsReport, apply_weights

LABELS = ("first", "second", "neither")
"""Which of the two images is the text's own, by class number."""
TEMPERATURE = 0.07
"""Sharpens how other images are drawn; the published code does not use the learned one here."""


class AssignmentModel(nn.Module):
    """The encoders, the multimodal one in pairs, and a linear head over the fused [CLS].

    Projections and temperature are those of pre-training and stay as they are: the image's
    projection only weighs which images are drawn, the others only travel with the weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = PairEncoder(config)
        self.image_projection = nn.Linear(config.image_width, config.feature_size)
        self.text_projection = nn.Linear(config.text_width, config.feature_size)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE), requires_grad=False)
        self.assignment_head = nn.Linear(config.text_width, len(LABELS))
        self.image_projection.requires_grad_(False)
        self.text_projection.requires_grad_(False)

    def forward(
        self,
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        first_image: Float[Tensor, "B K I"],
        second_image: Float[Tensor, "B K I"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 3"]:
        """Give a logit for each of `LABELS` from the tokens of two images a row."""
        text_tokens = self.text_encoder(token_ids, attention_mask, keys)
        fused = self.multimodal_encoder(
            text_tokens, attention_mask, first_image, second_image, keys
        )
        return self.assignment_head(fused[:, 0])


def start_assignment(
    student: AssignmentModel, pretrained: Mapping[str, Tensor], *, source: str
) -> WeightsReport:
    """Start from a pre-trained ALBEF by our names: each fusion layer becomes a pair.

    Raises InputError naming `source` where the weights do not fit.
    """
    return apply_weights(
        student,
        in_pairs(pretrained),
        source=source,
        may_miss=("assignment_head.",),
        may_add=("itm_head.", "mlm_head.", "queues.", "teacher."),
    )


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Two images for each text, as places among the candidates, and which is its own."""

    first: Int[Tensor, " B"]
    second: Int[Tensor, " B"]
    labels: Int[Tensor, " B"]
    """Places in `LABELS`."""


Assigner = Callable[
    [Float[Tensor, "B C"], Int[Tensor, " B"], Bool[Tensor, " B"], Float[Tensor, "3 B"]],
    Assignment,
]
"""Draws two images a text from the weights of the candidates, the place of the text's own image,
whether there are two others, and three numbers of [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class AssignmentStep:
    """What one step of text assignment gives: the loss, and the draws behind it."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "B 3"]
    labels: Int[Tensor, " B"]
    counts: Bool[Tensor, " B"]
    """False where a text is left out, because the batch has no two other images for it."""
    similarity: Float[Tensor, "B C"]
    weights: Float[Tensor, "B C"]
    assignment: Assignment
    image_tokens: Float[Tensor, "B K I"]


def draw_assignment(
    weights: Float[Tensor, "B C"],
    own: Int[Tensor, " B"],
    has_two_others: Bool[Tensor, " B"],
    numbers: Float[Tensor, "3 B"],
) -> Assignment:
    """Draw a label with equal chances, and other images in proportion to their weights.

    The text's own image is the first with label 0 and the second with label 1; with label 2 both
    are others, and differ. Raises RuntimeError where a row of `weights` has no candidate.
    """
    labels = (3 * numbers[0]).long()
    other = draw_hard_negatives(weights, numbers[1])
    needs_another = (labels == 2) & has_two_others
    rest = torch.where(needs_another[:, None], weights.scatter(1, other[:, None], 0), weights)
    another = draw_hard_negatives(rest, numbers[2])
    return Assignment(
        first=torch.where(labels == 0, own, other),
        second=torch.where(labels == 0, other, torch.where(labels == 1, own, another)),
        labels=labels,
    )


def assignment_step(
    student: AssignmentModel,
    batch: PairBatch,
    *,
    recipe: Recipe,
    seed: int = 0,
    micro_batch_size: int | None = None,
    draw: Assigner = draw_assignment,
) -> AssignmentStep:
    """Say which of two images a caption belongs to: the first, the second, neither (section 4).

    There is no teacher. With several workers `batch` is this worker's share, and the mean of the
    workers' losses is the loss of the global batch. Other images come from the global batch, or,
    with `recipe.negatives` `local` as published, from the worker's own. With
    `recipe.image_id_positives` another picture of the same photograph is not another image; with
    `recipe.guard_empty` a text without two others is left out, where the published code may stop.

    Args:
        student: the model that learns.
        batch: pairs of this worker; the masked captions are not used.
        recipe: which flaws of the published code are mended.
        seed: of this step's random choices, which depend on it and the pair's place alone.
        micro_batch_size: pairs whose activations are held at once; the gradient stays the same.
        draw: replaces how labels and images are drawn.
    """
    place = Place(batch, seed=seed, micro_batch_size=micro_batch_size)
    is_global = recipe.negatives == "global"
    image_tokens = place.chunks(student.image_encoder, batch.images)
    with torch.no_grad():
        features = full_precision(student.image_projection(image_tokens[:, 0]))
        features = candidates = F.normalize(features, dim=-1)
        ids, own = batch.image_ids, torch.arange(len(batch), device=features.device)
        if is_global:
            candidates = gather_rows(features, num_pairs=place.total)
            ids, own = gather_rows(ids, num_pairs=place.total), place.rows
        with no_autocast(features.device):
            similarity = features @ candidates.T / TEMPERATURE
        if recipe.image_id_positives:
            is_same = batch.image_ids[:, None] == ids
        else:
            is_same = own[:, None] == torch.arange(len(candidates), device=own.device)
        weights = negative_weights(similarity, is_same, guard_empty=recipe.guard_empty)
        has_two_others = (~is_same).sum(dim=1) >= 2
        counts = has_two_others if recipe.guard_empty else torch.ones_like(has_two_others)
        streams = Stream.ASSIGNMENT, Stream.IMAGE_DRAW, Stream.SECOND_IMAGE_DRAW
        numbers = torch.stack([uniforms(place.keys(stream)) for stream in streams])
        assignment = draw(weights, own, counts, numbers)

    def fetch(drawn: Int[Tensor, " B"]) -> Float[Tensor, "B K I"]:
        if is_global:
            return fetch_rows(image_tokens, drawn, num_pairs=place.total)
        return image_tokens[drawn]

    logits = place.chunks(
        student,
        batch.token_ids,
        batch.attention_mask,
        fetch(assignment.first),
        fetch(assignment.second),
        place.keys(Stream.TEXT),
    )
    logits = full_precision(logits)
    losses = F.cross_entropy(logits, assignment.labels, reduction="none")
    count = mean_over_workers(counts.sum().to(losses))
    return AssignmentStep(
        loss=(losses * counts).sum() / torch.where(count == 0, torch.ones_like(count), count),
        logits=logits,
        labels=assignment.labels,
        counts=counts,
        similarity=similarity,
        weights=weights,
        assignment=assignment,
        image_tokens=image_tokens,
    )


@torch.inference_mode()
def assign(
    model: AssignmentModel,
    images: Float[Tensor, "B 2 3 R R"],
    token_ids: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
) -> Float[Tensor, "B 3"]:
    """Give the probability of each of `LABELS` for two images a text; the model is in eval mode."""
    first, second = model.image_encoder(images.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    logits = model(token_ids, attention_mask, first, second)
    return full_precision(logits).softmax(dim=1)
