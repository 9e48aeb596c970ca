"""What the workers of one training tell each other; alone, every function is the identity.

A global batch is dealt in order: worker r of W holds `share_of(r, W, num_pairs)` of it. Shares may
differ by one pair, so any batch size fits any number of workers.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from albef_core.shares import share_of


def own_share(num_pairs: int) -> range:
    """Give the places that this worker holds of a global batch of `num_pairs`."""
    if not is_distributed():
        return range(num_pairs)
    return share_of(dist.get_rank(), dist.get_world_size(), num_pairs)


def rank() -> int:
    """Give the number of this worker; 0 when alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Count the workers; 1 when alone."""
    return dist.get_world_size() if is_distributed() else 1


def data_parallel(model: nn.Module) -> nn.Module:
    """Let workers average the gradients of a model during its backward pass; alone: the model.

    Plain DistributedDataParallel sorts its buckets anew after the first step of every process, and
    sums over three or more workers then round otherwise: a resumed training would differ in the
    last bits. Looking for unused parameters, of which there are none, keeps the buckets as they
    are. (`static_graph` would too, but does not see into a dataclass and averages nothing.)
    """
    if not is_distributed():
        return model
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
    )


class StepModel(nn.Module):
    """A student behind one `forward`, which is what `data_parallel` averages.

    `step` is a training step whose first argument is the student.
    """

    def __init__(self, student: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.student = student
        self._step = step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step on the student."""
        return self._step(self.student, *args, **kwargs)


def gather_rows(rows: Shaped[Tensor, " B *N"], *, num_pairs: int) -> Shaped[Tensor, " G *N"]:
    """Put together the rows of all workers in the order of the global batch; no gradient flows."""
    if not is_distributed():
        return rows.detach()
    shares = [share_of(rank, world_size(), num_pairs) for rank in range(world_size())]
    longest = max(len(share) for share in shares)
    # The collective wants equally many rows of everybody.
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: len(share)] for part, share in zip(gathered, shares, strict=True)])


def fetch_rows(
    rows: Float[Tensor, " B *N"], wanted: Int[Tensor, " B"], *, num_pairs: int
) -> Float[Tensor, " B *N"]:
    """Fetch one row of the global batch for each own row; gradients travel back to its owner.

    Only what is wanted travels (one all-to-all), not the whole batch.

    Args:
        rows: this worker's rows.
        wanted: places in the global batch.
        num_pairs: size of the global batch.
    """
    if not is_distributed():
        return rows[wanted]
    own, others = own_share(num_pairs), range(world_size())
    shares = [share_of(rank, world_size(), num_pairs) for rank in others]
    asked = gather_rows(wanted, num_pairs=num_pairs)
    is_mine = (asked >= own.start) & (asked < own.stop)
    to_send = [
        asked[share.start : share.stop][is_mine[share.start : share.stop]] for share in shares
    ]
    starts = torch.tensor([share.start for share in shares], device=wanted.device)
    owner = torch.searchsorted(starts, wanted, right=True) - 1
    counts = torch.bincount(owner, minlength=world_size()).tolist()
    arrived = _Exchange.apply(
        rows[torch.cat(to_send) - own.start], [len(part) for part in to_send], counts
    )
    # They come sorted by owner, and within one owner in the order in which they were asked for.
    order = owner.argsort(stable=True)
    return arrived[order.argsort()]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the backward pass sends gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(gradients[0], ctx.received, ctx.sent), None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
    return arrived


def mean_over_workers(values: Shaped[Tensor, "*N"]) -> Shaped[Tensor, "*N"]:
    """Average a tensor over all workers; no gradient flows."""
    if not is_distributed():
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def gather_objects(value: Any) -> list[Any]:
    """List a picklable value of every worker, in the order of ranks."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def is_distributed() -> bool:
    """Tell whether this process is one of several workers."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
