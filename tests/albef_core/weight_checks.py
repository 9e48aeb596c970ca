"""What the tests of weights ask of every module, file and refusal."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from albef_core.errors import InputError


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def refusal(act: Callable[[], object], *named_in_it: object) -> str:
    """Check that a mistake is told in one line which names all of these."""
    with pytest.raises(InputError) as refused:
        act()
    message = str(refused.value)
    assert "\n" not in message
    for name in named_in_it:
        assert str(name) in message
    return message
