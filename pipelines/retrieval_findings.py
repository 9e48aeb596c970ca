"""What scores of retrieval say beside the headline: the cost of k, slices, the worst and the best.

Axes: I images, T texts, P pairs; a row of a matrix is an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from albef_core.captions import length_name
from albef_core.metrics import (
    RECALLS_AT,
    Estimate,
    hit_chance,
    image_to_text_ranks,
    mean_estimate,
    retrieval_metrics,
    text_to_image_ranks,
)
from albef_core.tasks.retrieval import rank_judged, wanted_pairs

Direction = Literal["image to text", "text to image"]
Scores = tuple[Float[np.ndarray, "I T"], Float[np.ndarray, "I T"]]
"""Image to text and text to image."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """All that models have said of I images and T texts."""

    similarity: Float[np.ndarray, "I T"]
    """Cosines, by ITC."""
    pairs: Int[np.ndarray, "P 2"]
    """Those judged by ITM, sorted: what the largest k wants."""
    logits: Float[np.ndarray, "P 2"]
    """Of ITM; class 1 is a match."""
    image_of_text: Int[np.ndarray, " T"]

    def scores(self, top_k: int) -> Scores:
        """Re-rank each query's `top_k`, no more than were judged, by ITM."""
        matched = torch.full(self.similarity.shape, torch.nan)
        matched[tuple(self.pairs.T)] = torch.from_numpy(self.logits[:, 1])
        ways = rank_judged(torch.from_numpy(self.similarity), matched, top_k=top_k)
        return ways.image_to_text.numpy(), ways.text_to_image.numpy()

    def match(
        self, images: Int[np.ndarray, " N"], texts: Int[np.ndarray, " N"]
    ) -> Float[np.ndarray, " N"]:
        """Give ITM's probability that pairs, each of which was judged, belong together."""
        num_texts = self.similarity.shape[1]
        numbers = self.pairs[:, 0] * num_texts + self.pairs[:, 1]
        logits = self.logits[np.searchsorted(numbers, images * num_texts + texts)]
        return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """What re-ranking so many candidates gives, and what it costs."""

    top_k: int
    num_pairs: int
    """Pairs that ITM judges: one wanted both ways counts once."""
    mean_recall: Estimate


def sweep(judged: Judged, *, top_k: int, num_resamples: int, seed: int) -> list[SweepPoint]:
    """Measure with k = 1, 2, 4, ... and `top_k`, from judgments made for `top_k`."""
    similarity = torch.from_numpy(judged.similarity)
    points = []
    for k in sorted({2**n for n in range(top_k.bit_length())} | {top_k}):
        metrics = retrieval_metrics(
            *judged.scores(k), judged.image_of_text, num_resamples=num_resamples, seed=seed
        )
        num_pairs = len(wanted_pairs(similarity, top_k=k))
        mean = metrics["mean_recall"]
        points.append(SweepPoint(top_k=k, num_pairs=num_pairs, mean_recall=mean))
    return points


def caption_slices(
    text_to_image: Float[np.ndarray, "I T"],
    image_of_text: Int[np.ndarray, " T"],
    texts: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, dict[str, Estimate]]:
    """Measure `ir_r1`, `ir_r5`, `ir_r10` of the short, the medium and the long captions.

    Candidates are all images. Image to text has no such slices: an image's captions differ in
    length.
    """
    ranks = text_to_image_ranks(text_to_image, image_of_text)
    names = np.array([f"{length_name(text)} text" for text in texts])
    slices: dict[str, dict[str, Estimate]] = {}
    for name in ("short text", "medium text", "long text"):
        own = names == name
        if own.any():
            slices[name] = {
                f"ir_r{k}": mean_estimate(
                    (ranks[own] < k).astype(float),
                    np.full(own.sum(), hit_chance(len(text_to_image), 1, k)),
                    image_of_text[own],
                    num_resamples=num_resamples,
                    seed=seed,
                )
                for k in RECALLS_AT
            }
    return slices


@dataclass(frozen=True, kw_only=True)
class Case:
    """A query, and what came first."""

    direction: Direction
    image: int
    """The query, or the image of the query."""
    text: int
    """The query, or of the image's own texts the first."""
    found: int
    """The text or image that came first; for a wrong one, the first of the foreign."""
    match: float
    """ITM's probability of it."""
    rank: int
    """Of what is true; 0 is first."""


def find_cases(judged: Judged, scores: Scores, *, num: int) -> dict[str, list[Case]]:
    """Find the `worst` and the `best` of each direction, `num` each at most.

    That is where the model is surest of what it puts first, and wrong or right.
    """
    i2t, t2i = scores
    image_of_text = judged.image_of_text
    images, texts = np.arange(i2t.shape[0]), np.arange(i2t.shape[1])
    is_own = image_of_text == images[:, None]
    own_texts = np.where(is_own, i2t, -np.inf).argmax(axis=1)
    foreign_texts = np.where(is_own, -np.inf, i2t).argmax(axis=1)
    foreign_images = np.where(is_own, -np.inf, t2i).argmax(axis=0)
    text_ranks = image_to_text_ranks(i2t, image_of_text)
    image_ranks = text_to_image_ranks(t2i, image_of_text)
    found_texts = np.where(text_ranks == 0, own_texts, foreign_texts)
    found_images = np.where(image_ranks == 0, image_of_text, foreign_images)
    match_of_images = judged.match(images, found_texts)
    match_of_texts = judged.match(found_images, texts)

    def pick(is_wrong: bool) -> list[Case]:
        of_images = _surest(match_of_images, (text_ranks > 0) == is_wrong, num)
        of_texts = _surest(match_of_texts, (image_ranks > 0) == is_wrong, num)
        return [
            *(
                Case(
                    direction="image to text",
                    image=image,
                    text=int(own_texts[image]),
                    found=int(found_texts[image]),
                    match=float(match_of_images[image]),
                    rank=int(text_ranks[image]),
                )
                for image in of_images
            ),
            *(
                Case(
                    direction="text to image",
                    image=int(image_of_text[text]),
                    text=text,
                    found=int(found_images[text]),
                    match=float(match_of_texts[text]),
                    rank=int(image_ranks[text]),
                )
                for text in of_texts
            ),
        ]

    return {"worst": pick(is_wrong=True), "best": pick(is_wrong=False)}


def _surest(match: Float[np.ndarray, " N"], counts: Bool[np.ndarray, " N"], num: int) -> list[int]:
    places = np.flatnonzero(counts)
    return places[np.argsort(-match[places], kind="stable")[:num]].tolist()
