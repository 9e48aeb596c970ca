"""Micro-batches: fewer activations at a time, the same values and gradients."""

import pytest
import torch

from albef_core.chunks import in_chunks


def test_chunks_join_to_the_whole_with_the_same_gradient() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    net = net.double()
    rows = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = net(x) + shift
        return y, y.square().sum(dim=1)

    gradients = []
    for size in (None, 10, 4, 1, 99):
        net.zero_grad()
        rows.grad = None
        y, squares = in_chunks(both, rows, torch.arange(10.0)[:, None], size=size)
        # Rows meet in the loss, as they do in a contrast.
        (y @ y.T).softmax(dim=1).diagonal().log().sum().add(squares.sum()).backward()
        gradients.append([rows.grad, *(p.grad.clone() for p in net.parameters())])
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_one_chunk_of_activations_lives_at_a_time() -> None:
    alive, most = 0, 0

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, most
        alive += tensor.numel()
        most = max(most, alive)
        return tensor

    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin()
        return x

    kept = []
    for size in (None, 2):
        alive, most = 0, 0
        rows = torch.randn(16, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            in_chunks(deep, rows, size=size)
        kept.append(most)
    assert kept[0] == 20 * rows.numel()
    # Beside the arguments nothing is kept for the backward pass.
    assert kept[1] <= rows.numel()


def test_without_gradient_nothing_is_kept_and_the_values_are_the_same() -> None:
    rows = torch.randn(7, 3)
    with torch.no_grad():
        assert torch.equal(in_chunks(torch.sin, rows, size=3), rows.sin())


@pytest.mark.parametrize("size", [None, 2])
def test_a_missing_argument_is_passed_on(size: int | None) -> None:
    rows = torch.arange(5.0)
    result = in_chunks(lambda x, y: x if y is None else x + y, rows, None, size=size)
    assert torch.equal(result, rows)
