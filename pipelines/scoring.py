"""What the answers to examples are worth: classes, and questions with one or many annotators."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from albef_core.metrics import vqa_accuracies

ANNOTATORS_OF_VQA = 4
"""From so many answers to a question on, the score is that of VQA v2."""


def truths_of(task: str, examples: pa.Table) -> list[str]:
    """Give the class of each example, or the answer that most annotators gave."""
    if task != "vqa":
        return examples["label"].to_pylist()
    return [Counter(given).most_common(1)[0][0] for given in examples["answers"].to_pylist()]


def score_answers(task: str, examples: pa.Table, answered: Sequence[str]) -> NDArray[np.floating]:
    """Score an answer to each example (`examples.SCHEMA`): 1 right, 0 wrong.

    With four annotators or more the score is VQA v2's, which lies between where they disagree; with
    fewer, an answer is right that one of them gave.
    """
    if task != "vqa":
        return (np.array(examples["label"].to_pylist()) == np.array(answered)).astype(float)
    given = examples["answers"].to_pylist()
    scores = np.array([a in those for a, those in zip(answered, given, strict=True)], dtype=float)
    many = np.array([len(those) >= ANNOTATORS_OF_VQA for those in given])
    if many.any():
        places = np.flatnonzero(many).tolist()
        scores[many] = vqa_accuracies([answered[n] for n in places], [given[n] for n in places])
    return scores
