"""Whether one model is better than another: their scores on the same rows. Plain numpy."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from albef_core.metrics import COVERAGE, RECALLS_AT, image_to_text_ranks, text_to_image_ranks


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better a candidate is than a champion, with its uncertainty."""

    value: float
    """As measured: above 0 where the candidate is better."""
    low: float
    """Lower end of the interval; above 0 where the candidate is proven better."""
    high: float
    """Upper end of the interval."""


def paired_bootstrap(
    candidate: Float[np.ndarray, " N"],
    champion: Float[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    *,
    num_resamples: int,
    seed: int,
    parts: Int[np.ndarray, " N"] | None = None,
    coverage: float = COVERAGE,
) -> Difference:
    """Subtract the mean score of two models on the same rows, candidate less champion.

    Rows of one group, such as all queries of one picture, are not independent: whole groups are
    drawn with replacement, the same for both models, and the interval is that of the percentiles.
    With few groups it is too narrow; one group alone has a width of 0.

    Args:
        candidate: score of each row.
        champion: score of the same rows, in the same order.
        groups: number of the group that each row belongs to.
        num_resamples: how often groups are drawn.
        seed: of the draws; the same seed draws the same groups.
        parts: where rows are averaged within each part first, and then over the parts, as mean
            recall is over its two directions; every group needs rows of every part. None: one part.
        coverage: share of the resamples that lie in the interval.
    """
    _, group = np.unique(groups, return_inverse=True)
    part = np.zeros(len(group), dtype=np.int64)
    if parts is not None:
        _, part = np.unique(parts, return_inverse=True)
    shape = (int(group.max()) + 1, int(part.max()) + 1)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (group, part), candidate - champion)
    np.add.at(count, (group, part), 1)
    assert count.all(), "every group needs rows of every part"
    rng = np.random.default_rng(seed)
    num_groups = len(total)
    drawn = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_resamples)
    tail = (1 - coverage) / 2
    resampled = (drawn @ total / (drawn @ count)).mean(axis=1)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    value = (total.sum(axis=0) / count.sum(axis=0)).mean()
    return Difference(value=float(value), low=float(low), high=float(high))


def hit_shares(
    image_to_text: Float[np.ndarray, "I T"],
    text_to_image: Float[np.ndarray, "I T"],
    image_of_text: Int[np.ndarray, " T"],
) -> tuple[Float[np.ndarray, " I"], Float[np.ndarray, " T"]]:
    """Score each query of a retrieval: at how many of ranks 1, 5 and 10 it has found its own.

    The matrices are those of `retrieval_metrics`, whose mean recall is the mean of the two means.
    """
    ranks = (
        image_to_text_ranks(image_to_text, image_of_text),
        text_to_image_ranks(text_to_image, image_of_text),
    )
    images, texts = (np.mean([own < k for k in RECALLS_AT], axis=0) for own in ranks)
    return images, texts
