"""From the tensors of a step to the rows of the pictures that a training keeps."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from albef_core.distributed import gather_objects
from albef_core.masking import NOT_SCORED
from albef_core.outcome import PretrainingStep
from albef_core.tokenizer import Tokenizer
from pipelines.pairs import FeedBatch

if TYPE_CHECKING:
    from pipelines.report import CaptionTarget, WordTarget
    from pipelines.tracking import Tracker

# pipelines.report is imported by those that draw, on rank 0: matplotlib costs seconds.

PICTURE_ROWS = 5
"""Pairs in the pictures of hard negatives and of pseudo-targets."""
NUM_SHOWN = 5
"""Words and captions shown for a target, as in Fig. 2 of the paper."""


def log_pictures(
    tracker: "Tracker | None",
    batch: FeedBatch,
    outcome: PretrainingStep,
    tokenizer: Tokenizer,
    *,
    places: range,
    step: int,
) -> None:
    """Draw what is learned: hard negatives, and the teacher's pseudo-targets (a collective).

    The worker with the tracker shows pairs of its share, whose columns in the similarities are
    `places`.
    """
    shown = hardest_pairs(outcome, count=PICTURE_ROWS) if tracker else []
    images, texts = outcome.itm.negatives.images.tolist(), outcome.itm.negatives.texts.tolist()
    wanted = {column for row in shown for column in (images[row], texts[row])}
    pairs = pairs_at(wanted, batch, places=places)
    if tracker is None:
        return
    from pipelines.report import (  # noqa: PLC0415
        HardNegative,
        hard_negatives_figure,
        pseudo_targets_figure,
    )

    match = outcome.itm.logits.detach().softmax(dim=1)[:, 1].cpu().view(3, len(places))
    negatives = [
        HardNegative(
            image=batch.images[row],
            caption=batch.captions[row],
            match=float(match[0, row]),
            negative_caption=pairs[texts[row]][1],
            negative_caption_match=float(match[2, row]),
            negative_image=pairs[images[row]][0],
            negative_image_match=float(match[1, row]),
        )
        for row in shown
    ]
    tracker.log_figure(hard_negatives_figure(negatives), f"pictures/hard-negatives-{step:08d}.png")
    words = word_targets(batch, outcome, tokenizer, count=PICTURE_ROWS)
    captions = caption_targets(batch, outcome, count=PICTURE_ROWS)
    figure = pseudo_targets_figure(words, captions)
    tracker.log_figure(figure, f"pictures/pseudo-targets-{step:08d}.png")


def hardest_pairs(step: PretrainingStep, *, count: int) -> list[int]:
    """Name the rows whose drawn negatives fooled ITM the most."""
    match = step.itm.logits.detach().softmax(dim=1)[:, 1].cpu().view(3, -1)
    return (match[1] + match[2]).argsort(descending=True)[:count].tolist()


def pairs_at(
    wanted: Collection[int], batch: FeedBatch, *, places: range
) -> dict[int, tuple[NDArray[np.uint8], str]]:
    """Fetch picture and caption of some places in the global batch (a collective).

    Only these travel. Where workers compare with their own pairs alone, `places` starts at 0 on
    each of them, and the nearest worker's answer, its own, is taken.
    """
    asked = {place for places_wanted in gather_objects(wanted) for place in places_wanted}
    own = {
        place: (batch.images[place - places.start], batch.captions[place - places.start])
        for place in asked
        if place in places
    }
    found = {place: pair for told in gather_objects(own) for place, pair in told.items()}
    return found | own


def word_targets(
    batch: FeedBatch, step: PretrainingStep, tokenizer: Tokenizer, *, count: int
) -> "list[WordTarget]":
    """Show the teacher's words for some masks, the surest first."""
    from pipelines.report import WordTarget  # noqa: PLC0415

    rows, columns = np.nonzero(batch.mlm_labels != NOT_SCORED)
    known = step.mlm.teacher_logits[:, : tokenizer.vocab_size]  # the model may have spare rows
    probabilities, words = known.softmax(dim=1).topk(NUM_SHOWN)
    surest = probabilities[:, 0].argsort(descending=True).tolist()
    targets = []
    for target in surest[:count]:
        row, column = rows[target], columns[target]
        ids = batch.token_ids[row].copy()
        ids[column] = tokenizer.mask_id
        around = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
        targets.append(
            WordTarget(
                image=batch.images[row],
                masked_caption=_sentence(tokenizer.words(ids[~np.isin(ids, around)])),
                true_word=tokenizer.words(batch.mlm_labels[row, [column]])[0],
                words=tokenizer.words(words[target].cpu().numpy()),
                probabilities=probabilities[target].tolist(),
            )
        )
    return targets


def caption_targets(
    batch: FeedBatch, step: PretrainingStep, *, count: int
) -> "list[CaptionTarget]":
    """Show which captions of the batch the teacher finds nearest to some pictures."""
    from pipelines.report import CaptionTarget  # noqa: PLC0415

    cosines = step.teacher_image_features.float() @ step.teacher_text_features.float().T
    best = cosines.topk(min(NUM_SHOWN, len(batch.captions)))
    return [
        CaptionTarget(
            image=batch.images[row],
            true_caption=batch.captions[row],
            captions=[batch.captions[index] for index in best.indices[row].tolist()],
            similarities=best.values[row].tolist(),
        )
        for row in range(min(count, len(batch.captions)))
    ]


def hard_negative_similarity(step: PretrainingStep, temperature: torch.Tensor) -> torch.Tensor:
    """Average the cosine of true queries with their drawn negatives; high means hard."""
    texts = step.itc.i2t.detach().gather(1, step.itm.negatives.texts[:, None])
    images = step.itc.t2i.detach().gather(1, step.itm.negatives.images[:, None])
    return (texts.mean() + images.mean()) / 2 * temperature.detach()


def _sentence(pieces: list[str]) -> str:
    return " ".join(pieces).replace(" ##", "")
