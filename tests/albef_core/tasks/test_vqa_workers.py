"""A step of VQA is the same however many workers share its questions: real processes, gloo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from albef_core.config import ModelConfig
from albef_core.distributed import mean_over_workers, own_share
from albef_core.tasks.vqa import VqaBatch, vqa_step
from pipelines.presets import tiny
from tests.albef_core.tasks.questions import lagging_teacher, make_questions, random_vqa
from tests.processes import start_workers

NUM_ANSWERS = [2, 1, 3, 1, 4]  # five questions: the shares of two or three workers are uneven
SIZES = ModelConfig(
    **{**vars(tiny().model), "image_size": 32, "vocab_size": 60, "dropout": 0.1, "image_layers": 1}
)


def share_of(batch: VqaBatch, questions: range) -> VqaBatch:
    ends = [0, *batch.num_answers.cumsum(0).tolist()]
    rows = slice(questions.start, questions.stop)
    answers = slice(ends[questions.start], ends[questions.stop])
    return replace(
        batch,
        images=batch.images[rows],
        question_ids=batch.question_ids[rows],
        question_mask=batch.question_mask[rows],
        answer_ids=batch.answer_ids[answers],
        answer_mask=batch.answer_mask[answers],
        weights=batch.weights[answers],
        num_answers=batch.num_answers[rows],
        num_global=len(batch),
    )


def step() -> dict[str, Any]:
    """Give this worker's loss and gradients of one step on its share."""
    student = random_vqa(SIZES, scale=0.1)
    teacher = lagging_teacher(student, SIZES).double()
    student.double()
    batch = make_questions(SIZES, NUM_ANSWERS)
    batch = replace(batch, images=batch.images.double(), weights=batch.weights.double())
    own = share_of(batch, own_share(len(NUM_ANSWERS)))
    outcome = vqa_step(student, teacher, own, alpha=0.4, seed=3)
    outcome.loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    found |= {"loss": outcome.loss.detach()}
    return {name: mean_over_workers(value) for name, value in found.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [3])
def test_the_mean_over_workers_is_the_global_step(tmp_path: Path, num_workers: int) -> None:
    arguments = (num_workers, tmp_path)
    start_workers(_worker, *arguments, num=num_workers)
    alone = step()
    for rank in range(num_workers):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def _worker(rank: int, num_workers: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=num_workers
    )
    torch.save(step(), out / f"{rank}.pt")
    dist.destroy_process_group()
