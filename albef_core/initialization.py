"""How random weights start: as in BERT and DeiT at their width, and as strong at any other."""

import math

from torch import nn

PUBLISHED_DEVIATION, PUBLISHED_WIDTH = 0.02, 768


def deviation(width: int) -> float:
    """Give the standard deviation of the weights of a layer stack: 0.02 at BERT-base's width.

    What a layer adds is a sum over its inputs. With 0.02 in a narrow model it is so small that the
    layers say almost nothing for the first hundreds of steps.
    """
    return PUBLISHED_DEVIATION * math.sqrt(PUBLISHED_WIDTH / width)


def initialize_text(module: nn.Module, *, width: int) -> None:
    """Draw weights as BERT does, normal; biases are zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation(width))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


def initialize_image(module: nn.Module, *, width: int) -> None:
    """Draw weights as DeiT does, normal, cut off far out; biases are zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=deviation(width))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
