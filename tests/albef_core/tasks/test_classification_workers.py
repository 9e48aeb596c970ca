"""Any number of workers, uneven shares, micro-batches: the gradient is that of the whole batch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import corrected
from albef_core.distributed import data_parallel, mean_over_workers, own_share
from albef_core.tasks.entailment import EntailmentBatch, EntailmentModel, entailment_step
from albef_core.tasks.nlvr2 import Nlvr2Batch, Nlvr2Model, nlvr2_step
from albef_core.tasks.text_assignment import AssignmentModel, assignment_step
from albef_core.teacher import frozen_copy
from pipelines.presets import tiny
from tests.processes import start_workers

TASKS = ("entailment", "nlvr2", "assignment")
BATCH, TOKENS = 11, 8
SIZES = replace(tiny().model, vocab_size=100, dropout=0.1)
GRADIENT = 2e-6  # float32 sums in another order, over the norm of each gradient
ROUNDING = ".key.bias"  # its gradient is zero in theory


class Step(nn.Module):
    """A task's step behind one `forward`, as DistributedDataParallel wants it."""

    def __init__(self, step: Callable, student: nn.Module) -> None:
        super().__init__()
        self.step, self.student = step, student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(self.student, *args, **kwargs)


def rows() -> dict[str, Tensor]:
    """Eleven texts of several lengths, each with two images, some of one photograph."""
    generator = torch.Generator().manual_seed(0)
    side = SIZES.image_size
    words = torch.randint(5, SIZES.vocab_size, (BATCH, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (BATCH,), generator=generator)
    return {
        "images": torch.randn(BATCH, 2, 3, side, side, generator=generator),
        "token_ids": words,
        "attention_mask": torch.arange(TOKENS) < lengths[:, None],
        "labels": torch.randint(2, (BATCH,), generator=generator),
        "image_ids": torch.randint(6, (BATCH,), generator=generator),
    }


def run(task: str, *, micro_batch_size: int | None) -> dict[str, Any]:
    """Take one step on this worker's share; give loss and gradients of the whole batch."""
    own = own_share(BATCH)
    share = {name: value[own.start : own.stop] for name, value in rows().items()}
    texts = {name: share[name] for name in ("token_ids", "attention_mask")}
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size}
    torch.manual_seed(0)
    if task == "assignment":
        student, step = AssignmentModel(SIZES), assignment_step
        batch = PairBatch(
            **texts,
            images=share["images"][:, 0],
            masked_ids=share["token_ids"],
            mlm_labels=torch.full_like(share["token_ids"], -100),
            image_ids=share["image_ids"],
            num_global=BATCH,
        )
        arguments = [batch]
    elif task == "entailment":
        student, step = EntailmentModel(SIZES), entailment_step
        images, labels = share["images"][:, 0], share["labels"]
        batch = EntailmentBatch(**texts, images=images, labels=labels, num_global=BATCH)
        arguments = [frozen_copy(student), batch]
    else:
        student, step = Nlvr2Model(SIZES), nlvr2_step
        images, labels = share["images"], share["labels"]
        batch = Nlvr2Batch(**texts, images=images, labels=labels, num_global=BATCH)
        arguments = [frozen_copy(student), batch]
    options |= {"recipe": corrected()} if task == "assignment" else {"alpha": 0.4}
    model = data_parallel(Step(step, student))  # keeps its hooks alive through the backward pass
    outcome = model(*arguments, seed=7, **options)
    outcome.loss.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return {"loss": mean_over_workers(outcome.loss), "gradients": gradients}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    largest = max(gradient.norm() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        scale = largest if name.endswith(ROUNDING) else gradient.norm()
        distance = (found["gradients"][name] - gradient).norm()
        assert distance <= GRADIENT * max(scale, 1e-2 * largest), name


@pytest.mark.parametrize("task", TASKS)
def test_a_micro_batch_changes_nothing(task: str) -> None:
    assert_same(run(task, micro_batch_size=4), run(task, micro_batch_size=None))


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(3, 2)])
def test_workers_change_nothing_even_with_uneven_shares(
    tmp_path: Path, num_workers: int, micro_batch_size: int | None
) -> None:
    arguments = (num_workers, micro_batch_size, tmp_path)
    start_workers(_worker, *arguments, num=num_workers)
    for task in TASKS:
        expected = run(task, micro_batch_size=None)
        for rank in range(num_workers):
            found = torch.load(tmp_path / f"{task}-{rank}.pt", weights_only=True)
            assert_same(found, expected)


def _worker(rank: int, num_workers: int, micro_batch_size: int | None, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=num_workers
    )
    for task in TASKS:
        torch.save(run(task, micro_batch_size=micro_batch_size), out / f"{task}-{rank}.pt")
    dist.destroy_process_group()
