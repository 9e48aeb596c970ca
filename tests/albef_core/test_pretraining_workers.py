"""The same training whatever the number of workers and the micro-batch: real processes, gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, OptimConfig, corrected
from albef_core.distributed import (
    StepModel,
    data_parallel,
    gather_rows,
    mean_over_workers,
    own_share,
)
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from pipelines.presets import tiny
from tests.processes import start_workers

BATCH, TOKENS, STEPS, FEW = 24, 12, 30, 3
SIZES = ModelConfig(**{**vars(tiny().model), "vocab_size": 500, "dropout": 0.1})
OBJECTIVE = ObjectiveConfig(num_slots=40, teacher_momentum=0.99)

# Float32 sums in another order, over the norm of each gradient; measured: 5e-7. Matrix products of
# one or three rows take other kernels, which round differently in every row: measured 1e-6.
GRADIENT, GRADIENT_OF_FEW_ROWS = 1e-6, 2e-6
LOSSES = 1e-5
ROUNDING = ".key.bias"
"""Gradients that are zero in theory, because a softmax does not feel what all its keys share."""


def global_batch(step: int) -> dict[str, Tensor]:
    """Twenty-four pairs of eleven photographs; masked words are dealt unevenly."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (BATCH,), generator=generator)
    size = SIZES.image_size
    pictures = torch.randn(11, 3, size, size, generator=generator)
    words = torch.randint(5, SIZES.vocab_size, (BATCH, TOKENS), generator=generator)
    lengths = torch.randint(4, TOKENS + 1, (BATCH,), generator=generator)
    mask = torch.arange(TOKENS) < lengths[:, None]
    words = words.masked_fill(~mask, 0)
    share = torch.linspace(0, 0.6, BATCH)[:, None]
    hidden = mask & (torch.rand(BATCH, TOKENS, generator=generator) < share)
    return {
        "images": pictures[ids] + 0.3 * torch.randn(BATCH, 3, size, size, generator=generator),
        "token_ids": words,
        "attention_mask": mask,
        "masked_ids": words.masked_fill(hidden, 4),
        "mlm_labels": words.masked_fill(~hidden, -100),
        "image_ids": ids,
    }


def train(num_steps: int, *, micro_batch_size: int | None) -> dict[str, Any]:
    """Train from fixed weights; give the first gradients, all losses, and the queues' end."""
    torch.manual_seed(0)
    student = ALBEF(SIZES)
    teacher = Teacher(SIZES, student).eval()
    queues = Queues(SIZES, OBJECTIVE, corrected())
    optimizer = adamw(student, OptimConfig(lr=1e-4), decay_weights_only=True)
    model = data_parallel(StepModel(student, pretraining_step))
    own = own_share(BATCH)
    found: dict[str, Any] = {"losses": []}
    for step in range(num_steps):
        student.clamp_temperature()
        teacher.follow(student, momentum=OBJECTIVE.teacher_momentum)
        rows = {name: rows[own.start : own.stop] for name, rows in global_batch(step).items()}
        outcome = model(
            teacher,
            queues,
            PairBatch(**rows, num_global=BATCH),
            alpha=0.4,
            recipe=corrected(),
            seed=1000 + step,
            micro_batch_size=micro_batch_size,
        )
        optimizer.zero_grad()
        outcome.loss.backward()
        if step == 0:
            gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
            found["gradients"] = {n: g.clone() for n, g in gradients.items() if g is not None}
            assert found["gradients"].keys() == gradients.keys()
            found["negatives"] = gather_rows(outcome.itm.negatives.images, num_pairs=BATCH)
        optimizer.step()
        parts = [outcome.itc.loss, outcome.itm.loss, outcome.mlm.losses.total]
        found["losses"].append(mean_over_workers(torch.stack(parts)))
        push_step(queues, outcome, num_pairs=BATCH)
    found["losses"] = torch.stack(found["losses"])
    found["queue"] = queues.image.features
    found["queue ids"] = queues.image.image_ids
    return found


def assert_same(
    found: dict[str, Any], expected: dict[str, Any], *, limit: float = GRADIENT
) -> None:
    assert torch.equal(found["negatives"], expected["negatives"])
    largest = max(gradient.norm() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        scale = largest if name.endswith(ROUNDING) else gradient.norm()
        distance = (found["gradients"][name] - gradient).norm() / scale

        assert distance <= limit, f"{name}: {distance:.1e}"
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=LOSSES, atol=0)
    assert torch.equal(found["queue ids"], expected["queue ids"])
    torch.testing.assert_close(found["queue"], expected["queue"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def undivided() -> dict[int, dict[str, Any]]:
    """One worker, the whole batch at once, for many steps and for few."""
    torch.set_num_threads(1)
    return {steps: train(steps, micro_batch_size=None) for steps in (STEPS, FEW)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batch_size", "num_steps"), [(BATCH // 4, STEPS), (BATCH // 2, FEW)]
)
def test_a_micro_batch_changes_nothing(
    undivided: dict[int, dict[str, Any]], micro_batch_size: int, num_steps: int
) -> None:
    found = train(num_steps, micro_batch_size=micro_batch_size)
    assert_same(found, undivided[num_steps])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "micro_batch_size", "num_steps"),
    [(2, None, STEPS), (4, None, STEPS), (5, 2, FEW)],
)
def test_workers_change_nothing_even_with_uneven_shares(
    undivided: dict[int, dict[str, Any]],
    tmp_path: Path,
    num_workers: int,
    micro_batch_size: int | None,
    num_steps: int,
) -> None:
    arguments = (num_workers, micro_batch_size, num_steps, tmp_path)
    start_workers(_worker, *arguments, num=num_workers)
    for rank in range(num_workers):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        limit = GRADIENT if micro_batch_size is None else GRADIENT_OF_FEW_ROWS
        assert_same(found, undivided[num_steps], limit=limit)


def _worker(
    rank: int, num_workers: int, micro_batch_size: int | None, num_steps: int, out: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=num_workers
    )
    torch.save(train(num_steps, micro_batch_size=micro_batch_size), out / f"{rank}.pt")
    dist.destroy_process_group()
