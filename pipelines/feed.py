"""The batches of one train worker, in the plan's order, made by Ray Data tasks.

Each worker builds its own data sets inside the training function: no coordinator, no uneven split,
and a start at any step is arithmetic. Which items a step holds is the matter of order.py, what
an item looks like that of its spec: pairs.py, examples.py.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from albef_core.errors import InputError
from albef_core.shares import share_of
from pipelines.order import steps_per_epoch

BLOCKS_PER_SEGMENT = 500
"""Blocks of one Ray data set: planning costs about a millisecond a block before any runs."""
OVERLAP_STEPS = 8
"""Steps before a segment's end at which the next one's data set is started."""
BLOCKS_IN_STORE = 8
"""Blocks of one worker that may wait or be made at once in the object store."""
MIN_STORE_BYTES = 128_000_000
"""... but never less room than this, which small pictures do not fill."""

SCHEDULER_PAUSE_S = 0.02
"""Pause between two rounds of a data set's scheduler; a block takes ten times as long to make."""

Block = dict[str, NDArray[Any]]
Batch_co = TypeVar("Batch_co", covariant=True)


class Spec(Protocol[Batch_co]):
    """All that a task needs to make any item of the run; small, and the same for every worker."""

    @property
    def batch_size(self) -> int:
        """Items in a global batch, over all workers."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of the finished pictures in pixels."""
        ...

    @property
    def rows_per_block(self) -> int:
        """Most items that one task prepares."""
        ...

    def count(self) -> int:
        """Count the items of an epoch."""
        ...

    def prepare(self, *, step: int, start: int, stop: int) -> Block:
        """Make items start to stop of the global batch of one step: a column a field.

        Columns `step` and `position` say which they are.
        """
        ...

    def collect(self, step: int, epoch: int, columns: Block) -> Batch_co:
        """Make a worker's batch of the columns of its items."""
        ...


class Pace(ExecutionCallback):
    """Gives the trainer its core back.

    The scheduler is a thread of the training process. While its buffers are full, finished tasks
    stay ready and it polls them without a pause: measured in Ray 2.60, 80 % of a core and nearly
    all of the interpreter lock, at a third of the training speed.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Sleep, with the lock released."""
        time.sleep(SCHEDULER_PAUSE_S)


class FeedOrderError(RuntimeError):
    """A batch arrived that is not the one that the plan names."""


def batches(
    spec: Spec[Batch_co],
    *,
    start_step: int,
    stop_step: int,
    rank: int,
    world_size: int,
    task_cpus: float,
    cpu_limit: float,
) -> Iterator[Batch_co]:
    """Iterate over one worker's batches of steps start to stop, inside the training function.

    Worker `rank` receives `share_of` the items of every global batch, in their order. Nothing
    before `start_step` is read. Steps count on over epochs: epoch = step // steps_per_epoch.

    Args:
        spec: what an item looks like; the same on all workers.
        start_step: first global step.
        stop_step: the step after the last one.
        rank: number of this worker.
        world_size: workers, at most one an item.
        task_cpus: logical CPUs of one decoding task.
        cpu_limit: logical CPUs that this worker's tasks may hold together.

    Raises:
        InputError: the corpus is absent, damaged, or smaller than a global batch.
        FeedOrderError: a batch arrived out of turn.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    share = share_of(rank, world_size, spec.batch_size)
    starts = range(share.start, share.stop, spec.rows_per_block)
    plan = Plan(
        spec=spec,
        parts=[range(start, min(start + spec.rows_per_block, share.stop)) for start in starts],
        steps_per_epoch=steps_per_epoch(spec.count(), spec.batch_size),
        task_cpus=task_cpus,
        cpu_limit=max(cpu_limit, task_cpus),
    )
    return _run(plan, start_step, stop_step)


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[Batch_co]):
    """How one worker's share of every step is cut into tasks."""

    spec: Spec[Batch_co]
    parts: list[range]
    """Positions within the global batch, one range a task."""
    steps_per_epoch: int
    task_cpus: float
    cpu_limit: float


def _run(plan: Plan[Batch_co], start_step: int, stop_step: int) -> Iterator[Batch_co]:
    # One data set cannot hold a long run (planning it would take minutes), so the steps are cut
    # into segments; while one drains, a thread plans the next and waits for its first block.
    length = max(1, BLOCKS_PER_SEGMENT // len(plan.parts))
    segments = [
        range(first, min(first + length, stop_step))
        for first in range(start_step, stop_step, length)
    ]
    with ThreadPoolExecutor(max_workers=1) as starter:
        upcoming: Future[Iterator[Block]] | None = None
        for steps, following in zip(segments, [*segments, None][1:], strict=True):
            blocks = upcoming.result() if upcoming else _start(plan, steps)
            for step in steps:
                if following and step == steps[-OVERLAP_STEPS:][0]:
                    upcoming = starter.submit(_start, plan, following)
                yield _receive(plan, blocks, step)


def _start(plan: Plan, steps: range) -> Iterator[Block]:
    """Plan the data set of some steps, and wait for its first block."""
    dataset = _dataset(plan, steps)
    batches = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    blocks = cast("Iterator[Block]", iter(batches))
    return chain([next(blocks)], blocks)


def _dataset(plan: Plan, steps: range) -> ray.data.Dataset:
    """Describe the blocks of some steps: one item = one task = one block."""
    items = [
        {"step": step, "start": part.start, "stop": part.stop}
        for step in steps
        for part in plan.parts
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _task,  # pyright: ignore[reportArgumentType]  # Ray's type leaves out fn_kwargs
        batch_size=None,
        num_cpus=plan.task_cpus,
        fn_kwargs={"spec": plan.spec},
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        cpu=plan.cpu_limit, object_store_memory=_store_bytes(plan)
    )
    context.target_max_block_size = None  # or a large block would be cut in two
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [Pace]
    return dataset


def _task(item: Block, *, spec: Spec[Any]) -> Block:
    step, start, stop = (int(item[name][0]) for name in ("step", "start", "stop"))
    try:
        return spec.prepare(step=step, start=start, stop=stop)
    except InputError as error:
        # Ray keeps only the text of an exception: as data it arrives as what it is.
        return {"fault": np.array([str(error)], dtype=object)}


def _receive(plan: Plan[Batch_co], blocks: Iterator[Block], step: int) -> Batch_co:
    """Take the blocks of one step, refusing any that is not due."""
    parts = []
    for due in plan.parts:
        block = next(blocks)
        if "fault" in block:
            raise InputError(block["fault"][0])
        _check(block, step, due)
        parts.append(block)
    columns = parts[0]
    if len(parts) > 1:
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return plan.spec.collect(step, step // plan.steps_per_epoch, columns)


def _check(block: Block, step: int, due: range) -> None:
    is_due = np.array_equal(block["position"], due) and bool((block["step"] == step).all())
    if not is_due:
        raise FeedOrderError(
            f"feed: step {step}, items {due.start} to {due.stop - 1} are due; step"
            f" {block['step'][0]}, items {block['position'][0]} to {block['position'][-1]} came."
            " Training on would break the plan: start again from the last checkpoint."
        )


def _store_bytes(plan: Plan) -> int:
    pictures = 3 * plan.spec.image_size**2 * max(len(part) for part in plan.parts)
    return max(MIN_STORE_BYTES, BLOCKS_IN_STORE * pictures)
