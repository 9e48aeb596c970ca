"""Random numbers that depend on a key and a place, and not on who draws them or in what company.

A pair keeps its dropout masks and its hard negatives whatever worker or micro-batch it falls into.
PyTorch's generators cannot do that: they count calls.
"""

from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Odd numbers that spread neighboring rows, places and streams over all 32 bits.
_ODD = (0x1E3779B1, 0x05EBCA77, 0x42B2AE3D, 0x27D4EB2F)


class Stream(IntEnum):
    """What a random number of a training step is for; streams never overlap."""

    TEXT = 0
    MATCHED = 1
    WRONG_IMAGE = 2
    WRONG_TEXT = 3
    MASKED = 4
    TEACHER_TEXT = 5
    TEACHER_MASKED = 6
    IMAGE_DRAW = 7
    TEXT_DRAW = 8
    ANSWER = 9
    TEACHER_ANSWER = 10
    ASSIGNMENT = 11
    SECOND_IMAGE_DRAW = 12


def row_keys(rows: Int[Tensor, " B"], *, seed: int, stream: Stream) -> Int[Tensor, " B"]:
    """Give each row of the global batch its 32-bit key in one stream of one step.

    Args:
        rows: places in the global batch.
        seed: of this step, up to 64 bits.
        stream: what the random numbers are for.
    """
    keys = (rows & 0x7FFFFFFF).to(torch.int32)
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, int(stream)):
        keys = _scramble(keys * _ODD[0] + _signed(word))
    return keys


def uniforms(keys: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Turn each key into a float64 in [0, 1)."""
    return (_scramble(keys).to(torch.int64) & 0xFFFFFFFF).double() / 2**32


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the row's key, this site and the place in the row.

    The place counts by coordinates and not by memory: longer padding moves no mask. Without keys
    (in training only) the rows draw some from PyTorch's generator: plain dropout.
    """

    def __init__(self, share: float, *, site: int) -> None:
        super().__init__()
        self.share, self.site = share, site

    @property
    def is_active(self) -> bool:
        """Tell whether anything is dropped now."""
        return self.training and self.share > 0

    def forward(
        self, x: Float[Tensor, " B *N"], keys: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B *N"]:
        """Zero a share of the numbers and scale the rest so that the mean stays."""
        if not self.is_active:
            return x
        if keys is None:
            keys = torch.randint(2**31, (len(x),), device=x.device, dtype=torch.int32)
        return x * (self.kept(x, keys).to(x.dtype) / (1 - self.share))

    def kept(self, x: Float[Tensor, " B *N"], keys: Int[Tensor, " B"]) -> Bool[Tensor, " B *N"]:
        """Say which numbers stay."""
        places = _scramble(keys + _signed(self.site * _ODD[0])).view(-1, *[1] * (x.dim() - 1))
        for dim in range(1, x.dim()):
            along = torch.arange(x.shape[dim], device=x.device, dtype=torch.int32) * _ODD[dim]
            places = places + along.view(-1, *[1] * (x.dim() - 1 - dim))
        return (_scramble(places) & 0x7FFFFFFF) >= int(self.share * 2**31)


def _scramble(x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """Mix 32 bits so that every bit of the input flips half of the output's.

    A xorshift-multiply permutation with the constants that C. Wellons' search found least biased
    ("lowbias32", nullprogram.com, 2018). Multiplication wraps, as int32 does.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    """Read 32 bits as a signed number, as int32 tensors hold them."""
    return (word + 2**31) % 2**32 - 2**31
