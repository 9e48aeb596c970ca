"""MLM agrees with its equations, and a batch with nothing masked does no harm."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.objectives.mlm import mlm_loss
from tests.albef_core import literal

# Both sides compute in float64 and differ in the order of their sums.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


@settings(max_examples=60)
@given(
    num_masked=st.integers(1, 4),
    num_words=st.integers(2, 6),
    alpha=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    guard_empty=st.booleans(),
    seed=st.integers(0, 999),
)
def test_mlm_equals_its_equations_forward_and_backward(
    num_masked: int, num_words: int, alpha: float, scale: float, guard_empty: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher_logits = rng.normal(scale=scale, size=(2, num_masked, num_words))
    labels = rng.integers(num_words, size=num_masked)
    ours = torch.from_numpy(logits).requires_grad_()
    losses = mlm_loss(
        ours,
        torch.from_numpy(teacher_logits),
        torch.from_numpy(labels),
        alpha=alpha,
        count=torch.tensor(float(num_masked)),
        guard_empty=guard_empty,
    )
    losses.total.backward()

    def slow_losses(logits: np.ndarray) -> tuple:
        return literal.mlm_losses(logits, teacher_logits, labels, alpha=alpha)

    found = [losses.total.item(), losses.labels.item(), losses.teacher.item()]
    np.testing.assert_allclose(found, slow_losses(logits), **EXACT)
    slopes = literal.gradient(lambda x: slow_losses(x)[0], logits)
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), slopes, **EXACT)


def test_mlm_of_one_word_worked_out_by_hand() -> None:
    logits = torch.tensor([[np.log(3.0), 0.0]])  # shares 3/4 and 1/4
    teacher_logits = torch.tensor([[0.0, 0.0]])
    losses = mlm_loss(
        logits,
        teacher_logits,
        torch.tensor([1]),
        alpha=0.4,
        count=torch.tensor(1.0),
        guard_empty=True,
    )
    assert losses.labels.item() == pytest.approx(np.log(4.0))
    assert losses.teacher.item() == pytest.approx((np.log(4.0) + np.log(4 / 3)) / 2)
    assert losses.total.item() == pytest.approx(
        0.6 * losses.labels.item() + 0.4 * losses.teacher.item()
    )


def test_with_nothing_masked_loss_and_gradient_are_zero() -> None:
    tokens = torch.randn(0, 3)
    head = torch.nn.Linear(3, 5)
    losses = mlm_loss(
        head(tokens),
        torch.zeros(0, 5),
        torch.zeros(0, dtype=torch.int64),
        alpha=0.4,
        count=torch.tensor(0.0),
        guard_empty=True,
    )
    losses.total.backward()
    assert losses.total.item() == losses.labels.item() == losses.teacher.item() == 0
    assert head.weight.grad is not None
    assert (head.weight.grad == 0).all()


def test_with_nothing_masked_the_published_loss_is_nan() -> None:
    losses = mlm_loss(
        torch.zeros(0, 5),
        torch.zeros(0, 5),
        torch.zeros(0, dtype=torch.int64),
        alpha=0.4,
        count=torch.tensor(0.0),
        guard_empty=False,
    )
    assert losses.total.isnan()
