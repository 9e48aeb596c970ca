"""From the tensors of a step to the rows of the pictures that a training keeps."""

import numpy as np
import torch

from albef_core.masking import NOT_SCORED
from albef_core.pretraining import PretrainingStep
from albef_core.tokenizer import Tokenizer
from pipelines.feed import FeedBatch
from pipelines.report import CaptionTarget, HardNegative, WordTarget

NUM_SHOWN = 5
"""Words and captions shown for a target, as in Fig. 2 of the paper."""


def hard_negatives(batch: FeedBatch, step: PretrainingStep, *, count: int) -> list[HardNegative]:
    """Show the pairs whose drawn negatives fooled ITM the most."""
    num_pairs = len(batch.captions)
    match = step.itm.logits.detach().softmax(dim=1)[:, 1].cpu().view(3, num_pairs)
    images, texts = step.itm.negatives.images.tolist(), step.itm.negatives.texts.tolist()
    hardest = (match[1] + match[2]).argsort(descending=True)[:count].tolist()
    return [
        HardNegative(
            image=batch.images[row],
            caption=batch.captions[row],
            match=float(match[0, row]),
            negative_caption=batch.captions[texts[row]],
            negative_caption_match=float(match[2, row]),
            negative_image=batch.images[images[row]],
            negative_image_match=float(match[1, row]),
        )
        for row in hardest
    ]


def word_targets(
    batch: FeedBatch, step: PretrainingStep, tokenizer: Tokenizer, *, count: int
) -> list[WordTarget]:
    """Show the teacher's words for some masks, the surest first."""
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


def caption_targets(batch: FeedBatch, step: PretrainingStep, *, count: int) -> list[CaptionTarget]:
    """Show which captions of the batch the teacher finds nearest to some pictures."""
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
