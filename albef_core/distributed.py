"""What the workers of one training tell each other; alone, every function is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def gather_rows(rows: Shaped[Tensor, " B *N"]) -> Shaped[Tensor, " K *N"]:
    """Concatenate equally many rows of every worker, in the order of ranks; no gradient flows."""
    if not is_distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def rows_of_others(rows: Shaped[Tensor, " B *N"]) -> Shaped[Tensor, " K *N"]:
    """Concatenate the rows of every worker but this one, in the order of ranks; none when alone."""
    num_rows = len(rows)
    start = dist.get_rank() * num_rows if is_distributed() else 0
    everywhere = gather_rows(rows)
    return torch.cat([everywhere[:start], everywhere[start + num_rows :]])


def gather_objects(value: Any) -> list[Any]:
    """List a picklable value of every worker, in the order of ranks."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def mean_over_workers(values: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
    """Average a tensor over all workers."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def is_distributed() -> bool:
    """Tell whether this process is one of several workers."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
