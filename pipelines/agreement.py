"""Before every step, all workers agree on which it is, what its batch holds, and on stopping.

Over gloo even where gradients travel by NCCL: a few numbers on the CPU, and no wait for the GPU.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from albef_core.distributed import is_distributed


class DisagreementError(RuntimeError):
    """The workers are not at the same step: going on would mix two trainings."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all workers do next."""

    longest: int
    """Tokens of the longest caption in the global batch."""
    num_bad: int
    """Pictures of the global batch that did not decode."""
    must_stop: bool
    """Make this step the last one, and leave a checkpoint."""


class Agreement:
    """The workers' council; every method is a collective."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if is_distributed() else None

    def reach(self, step: int, *, longest: int, num_bad: int, must_stop: bool) -> Agreed:
        """Tell the others what is known here; learn what holds for all.

        Raises:
            DisagreementError: a worker is at another step.
        """
        if not isinstance(self._group, dist.ProcessGroup):
            return Agreed(longest=longest, num_bad=num_bad, must_stop=must_stop)
        own = torch.tensor([step, longest, num_bad, must_stop], dtype=torch.int64)
        all_told = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_told, own, group=self._group)
        steps, lengths, bad, stops = torch.stack(all_told).T.tolist()
        if len(set(steps)) > 1:
            raise DisagreementError(
                f"workers 0 to {len(steps) - 1} are at steps {steps}, not at the same one."
                " They start again from the newest checkpoint."
            )
        return Agreed(longest=max(lengths), num_bad=sum(bad), must_stop=any(stops))

    @torch.no_grad()
    def check_replicas(self, model: nn.Module) -> None:
        """Make sure that all workers hold the same weights, bit for bit.

        Raises:
            DisagreementError: they have drifted apart.
        """
        if not isinstance(self._group, dist.ProcessGroup):
            return
        norms = torch.stack([parameter.double().norm() for parameter in model.parameters()]).cpu()
        all_norms = [torch.empty_like(norms) for _ in range(dist.get_world_size())]
        dist.all_gather(all_norms, norms, group=self._group)
        if any(not torch.equal(norms, other) for other in all_norms if norms.isfinite().all()):
            raise DisagreementError(
                "the workers' weights have drifted apart: their gradients were not averaged alike."
                " They start again from the newest checkpoint."
            )
