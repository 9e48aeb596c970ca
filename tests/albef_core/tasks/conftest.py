"""Random weights that tell inputs apart."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def randomize() -> Callable[..., nn.Module]:
    """Give a function that draws larger weights than a fresh model's."""

    def draw(model: nn.Module, *, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(center + 0.3 * noise)
        return model

    return draw
