"""ITC, the image-text contrastive loss, and its distilled targets (ALBEF sections 3.2 and 3.3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.feature_queue import NO_IMAGE, FeatureQueue
from albef_core.precision import full_precision, no_autocast


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a query is compared with: the teacher's features of the batch, then of the queue."""

    features: Float[Tensor, "K D"]
    is_positive: Bool[Tensor, "B K"]
    """True where a key belongs to the query's own image; at least one a row."""
    is_valid: Bool[Tensor, " K"]
    """False on slots of the queue that were never written."""


def gather_keys(
    batch_features: Float[Tensor, "G D"],
    batch_ids: Int[Tensor, " G"],
    queue: FeatureQueue,
    *,
    queries: range,
    image_id_positives: bool,
) -> Keys:
    """Put the batch's teacher features before the queue as it was, and mark the positives.

    `queries` are the rows of the batch that ask: all of it, or this worker's share. With
    `image_id_positives` every key of the same photograph is positive; without, only the query's
    own row, as in the published code.
    """
    key_ids = torch.cat([batch_ids, queue.image_ids])
    is_valid = torch.cat([torch.ones_like(batch_ids, dtype=torch.bool), queue.is_valid])
    if image_id_positives:
        own_ids = batch_ids[queries.start : queries.stop]
        is_positive = (own_ids[:, None] == key_ids) & is_valid & (key_ids != NO_IMAGE)
    else:
        rows = torch.arange(queries.start, queries.stop, device=batch_ids.device)
        is_positive = rows[:, None] == torch.arange(len(key_ids), device=batch_ids.device)
    features = torch.cat([batch_features, queue.features.to(batch_features.dtype)])
    return Keys(features=features, is_positive=is_positive, is_valid=is_valid)


def similarities(
    queries: Float[Tensor, "B D"], keys: Keys, temperature: Float[Tensor, ""]
) -> Float[Tensor, "B K"]:
    """Divide cosines by the temperature (equation 1); unwritten slots get the lowest number.

    Finite, because a target of 0 times minus infinity would be NaN; its exponential is 0 all the
    same.
    """
    with no_autocast(queries.device):
        similarity = full_precision(queries) @ full_precision(keys.features).T / temperature
    return similarity.masked_fill(~keys.is_valid, torch.finfo(similarity.dtype).min)


def itc_targets(
    teacher_similarity: Float[Tensor, "B K"], is_positive: Bool[Tensor, "B K"], *, alpha: float
) -> Float[Tensor, "B K"]:
    """Mix the labels with the teacher's softmax (equation 6): `alpha` of the latter."""
    hard = is_positive.to(teacher_similarity) / is_positive.sum(dim=1, keepdim=True)
    return alpha * teacher_similarity.softmax(dim=1) + (1 - alpha) * hard


def itc_loss(
    similarity: Float[Tensor, "B K"], targets: Float[Tensor, "B K"], *, count: float
) -> Float[Tensor, ""]:
    """Cross-entropy between the targets and one direction's softmax (equations 2 and 6).

    The sum over the rows is divided by `count`: B, or what a worker holds on average.
    """
    return F.cross_entropy(similarity, targets, reduction="sum") / count
