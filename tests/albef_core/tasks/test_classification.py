"""The distilled loss agrees with its equation, and alpha 0 is no distillation."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.tasks.classification import distilled_loss, two_layer_head
from tests.albef_core import literal

# Both sides compute in float64 and differ in the order of their sums.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


def slow_loss(
    logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray, *, alpha: float
) -> Any:
    """The mean over rows of (1 - alpha) CE - alpha sum(log softmax(p) softmax(p_m))."""
    total: Any = 0.0
    for row, teacher_row, label in zip(logits, teacher_logits, labels, strict=True):
        log_shares = literal.log_softmax(row)
        total = total - (1 - alpha) * log_shares[label]
        for log_share, share in zip(log_shares, literal.softmax(teacher_row), strict=True):
            total = total - alpha * log_share * share
    return total / len(logits)


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 5),
    num_classes=st.integers(2, 4),
    alpha=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_the_loss_equals_its_equation_forward_and_backward(
    num_rows: int, num_classes: int, alpha: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher_logits = rng.normal(scale=scale, size=(2, num_rows, num_classes))
    labels = rng.integers(num_classes, size=num_rows)
    ours = torch.from_numpy(logits).requires_grad_()
    theirs = torch.from_numpy(teacher_logits)
    loss = distilled_loss(
        ours, theirs, torch.from_numpy(labels), alpha=alpha, count=float(num_rows)
    )
    loss.backward()
    expected = slow_loss(logits, teacher_logits, labels, alpha=alpha)
    np.testing.assert_allclose(loss.item(), expected, **EXACT)
    slopes = literal.gradient(
        lambda x: slow_loss(x, teacher_logits, labels, alpha=alpha), at=logits
    )
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), slopes, **EXACT)


def test_the_loss_of_one_row_worked_out_by_hand() -> None:
    logits = torch.tensor([[np.log(3.0), 0.0]])  # shares 3/4 and 1/4
    loss = distilled_loss(logits, torch.zeros(1, 2), torch.tensor([1]), alpha=0.4, count=1.0)
    soft = (np.log(4.0) + np.log(4 / 3)) / 2
    assert loss.item() == pytest.approx(0.6 * np.log(4.0) + 0.4 * soft)


def test_alpha_zero_is_plain_cross_entropy_whatever_the_teacher_says() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    loss = distilled_loss(logits, 50 * torch.randn(4, 3), labels, alpha=0.0, count=4.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_the_shares_of_uneven_workers_average_to_the_loss_of_the_whole() -> None:
    logits, teacher_logits = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    parts = [
        distilled_loss(logits[rows], teacher_logits[rows], labels[rows], alpha=0.4, count=5 / 2)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    whole = distilled_loss(logits, teacher_logits, labels, alpha=0.4, count=5.0)
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_the_head_is_two_layers_with_a_relu_between() -> None:
    head = two_layer_head(4, num_classes=3)
    x = torch.randn(2, 4)
    first, second = head[0], head[2]
    raised = (x @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(head(x), raised @ second.weight.T + second.bias)
