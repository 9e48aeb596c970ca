"""Micro-batches: work on a few rows at a time, with the gradient of all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., Any], *rows: Tensor | None, size: int | None) -> Any:
    """Apply a row-wise function to `size` rows at a time; join what it gives.

    Nothing inside a chunk is kept for the backward pass: it is computed again there, chunk by
    chunk, so that activations of one chunk exist at a time, while losses still compare all rows.
    That is GradCache (Gao et al. 2021, arXiv 2101.06983) in the words of autograd. `function` must
    give a tensor or a tuple of them, and must not draw from PyTorch's generators. Arguments that
    are None are passed on; `size` None: all at once.
    """
    num_rows = len(next(argument for argument in rows if argument is not None))
    if size is None or size >= num_rows:
        return function(*rows)

    def run(start: int) -> Any:
        part = [None if row is None else row[start : start + size] for row in rows]
        if not torch.is_grad_enabled():
            return function(*part)
        return checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)

    parts = [run(start) for start in range(0, num_rows, size)]
    columns = [(part,) if isinstance(part, Tensor) else part for part in parts]
    joined = tuple(torch.cat(column) for column in zip(*columns, strict=True))
    return joined[0] if isinstance(parts[0], Tensor) else joined
