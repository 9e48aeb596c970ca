"""Workers of a test: real processes that start at once, because one has imported torch for all."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes


def start_workers(work: Callable[..., None], *args: Any, num: int) -> None:
    """Run `work(rank, *args)` in so many processes; what one raises is raised here."""
    multiprocessing.set_forkserver_preload(
        ["torch", "torch.distributed", "albef_core.pretraining", "albef_core.tasks.folder"]
    )
    start_processes(work, args=args, nprocs=num, start_method="forkserver")
