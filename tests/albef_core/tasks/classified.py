"""Entailment and NLVR2 by what the tests of both need: models, batches, steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import corrected
from albef_core.tasks.classification import ClassificationStep
from albef_core.tasks.entailment import (
    EntailmentBatch,
    EntailmentModel,
    entail,
    entailment_step,
    start_entailment,
)
from albef_core.tasks.nlvr2 import Nlvr2Batch, Nlvr2Model, nlvr2_step, start_nlvr2, verify
from albef_core.teacher import frozen_copy
from tests.albef_core.tasks.recording import Recording
from tests.golden_folder import GOLDEN

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the two."""

    folder: str
    """Of its recordings."""
    make: type[nn.Module]
    start: Callable[..., tuple[nn.Module, object]]
    step: Callable[..., ClassificationStep]
    predict: Callable[..., Tensor]
    """Probabilities, a row a text."""
    recorded: Callable[[Mapping[str, Tensor], torch.dtype], EntailmentBatch | Nlvr2Batch]
    """Makes the recorded batch."""
    small: Callable[[PairBatch], EntailmentBatch | Nlvr2Batch]
    """Makes a batch of the small pairs."""


def replay(task: Task, dtype: torch.dtype) -> tuple[Recording, nn.Module, nn.Module]:
    """Give a task's recording, and student and teacher with the recorded weights."""
    recording = Recording(GOLDEN / task.folder)
    student = task.make(recording.sizes)
    teacher = frozen_copy(student)
    recording.load(student=student, teacher=teacher)
    return recording, student.to(dtype), teacher.to(dtype)


def recorded_logits(recording: Recording, dtype: torch.dtype) -> Tensor:
    """Give what the official evaluation said, in the precision that is compared with."""
    if dtype == torch.float64:
        return torch.tensor(recording.scalars["eval_logits_float64"], dtype=dtype)
    return recording.tensors["eval_logits"]


def _entailment_recorded(recorded: Mapping[str, Tensor], dtype: torch.dtype) -> EntailmentBatch:
    return EntailmentBatch(
        images=recorded["image"].to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        labels=recorded["targets"],
    )


def _nlvr2_recorded(recorded: Mapping[str, Tensor], dtype: torch.dtype) -> Nlvr2Batch:
    first, second = recorded["images"].chunk(2)  # all first images, then all second ones
    return Nlvr2Batch(
        images=torch.stack([first, second], dim=1).to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        labels=recorded["targets"],
    )


def _entailment_small(pairs: PairBatch) -> EntailmentBatch:
    return EntailmentBatch(
        images=pairs.images,
        token_ids=pairs.token_ids,
        attention_mask=pairs.attention_mask,
        labels=torch.arange(len(pairs)) % 3,
    )


def _nlvr2_small(pairs: PairBatch) -> Nlvr2Batch:
    return Nlvr2Batch(
        images=torch.stack([pairs.images, pairs.images.flip(0)], dim=1),
        token_ids=pairs.token_ids,
        attention_mask=pairs.attention_mask,
        labels=torch.arange(len(pairs)) % 2,
    )


ENTAILMENT = Task(
    folder="ve",
    make=EntailmentModel,
    start=start_entailment,
    step=entailment_step,
    predict=entail,
    recorded=_entailment_recorded,
    small=_entailment_small,
)
NLVR2 = Task(
    folder="nlvr",
    make=Nlvr2Model,
    start=partial(start_nlvr2, recipe=corrected()),
    step=nlvr2_step,
    predict=verify,
    recorded=_nlvr2_recorded,
    small=_nlvr2_small,
)
TASKS = pytest.mark.parametrize("task", [ENTAILMENT, NLVR2], ids=["entailment", "nlvr2"])
