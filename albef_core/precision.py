"""Similarities, softmax and losses in float32, whatever the encoders use."""

import torch
from jaxtyping import Float
from torch import Tensor


def full_precision(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Widen half precision to float32; float32 and float64 pass."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(device: torch.device) -> torch.autocast:
    """Switch autocast off for a block: under it, even float32 inputs would multiply in bfloat16."""
    return torch.autocast(device.type, enabled=False)
