"""Small VQA models and batches of questions for the tests of the task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from albef_core.config import ModelConfig
from albef_core.tasks.vqa import VqaBatch, VqaModel
from albef_core.teacher import follow, frozen_copy

CLS, SEP = 1, 2
QUESTION_TOKENS = 6


def random_vqa(config: ModelConfig, *, seed: int = 0, scale: float = 0.3) -> VqaModel:
    """Draw larger weights than a fresh model's, so that different inputs look different."""
    generator = torch.Generator().manual_seed(seed)
    model = VqaModel(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.copy_(center + scale * noise)
    return model


def lagging_teacher(student: VqaModel, config: ModelConfig) -> VqaModel:
    teacher = frozen_copy(student)
    follow(teacher, random_vqa(config, seed=1), momentum=0.9)
    return teacher


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to the longest; give the mask beside them."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
    return ids, mask


def make_questions(
    config: ModelConfig, num_answers: Sequence[int], *, seed: int = 0, num_global: int | None = None
) -> VqaBatch:
    """Questions of falling length, answers of one to three words."""
    generator = torch.Generator().manual_seed(seed)

    def words(num: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (num,), generator=generator).tolist()

    num, size = len(num_answers), config.image_size
    questions = [[CLS, *words(max(1, QUESTION_TOKENS - 1 - row))] for row in range(num)]
    answers = [[CLS, *words(1 + row % 3), SEP] for row in range(sum(num_answers))]
    question_ids, question_mask = padded(questions)
    answer_ids, answer_mask = padded(answers)
    return VqaBatch(
        images=torch.randn(num, 3, size, size, generator=generator),
        question_ids=question_ids,
        question_mask=question_mask,
        answer_ids=answer_ids,
        answer_mask=answer_mask,
        weights=torch.rand(sum(num_answers), generator=generator),
        num_answers=torch.tensor(num_answers),
        num_global=num_global,
    )
