"""The batches of one train worker, in the plan's order, made by Ray Data tasks.

Each worker builds its own data sets inside the training function: no coordinator, no uneven split,
and a start at any step is arithmetic. Which pairs a step holds is the matter of order.py, what
a pair looks like that of pairs.py.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import ray.data
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from albef_core.errors import InputError
from albef_core.shares import share_of
from pipelines.order import steps_per_epoch
from pipelines.pairs import FeedSpec, open_corpus, prepare_block

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


@dataclass(frozen=True, kw_only=True)
class FeedBatch:
    """One worker's share of one global step; the arrays may be read-only views of shared memory."""

    step: int
    """Global step, from 0 over all epochs."""
    epoch: int
    images: NDArray[np.uint8]
    """Augmented pictures (B, S, S, 3)."""
    token_ids: NDArray[np.int32]
    """Captions (B, L), padded to `max_tokens`."""
    masked_ids: NDArray[np.int32]
    """The captions with some words replaced (B, L)."""
    mlm_labels: NDArray[np.int32]
    """The original id where MLM is scored, -100 elsewhere (B, L)."""
    image_keys: NDArray[np.int64]
    """`pairs.image_key` of every picture (B)."""
    image_ids: list[str]
    captions: list[str]
    """The chosen captions as they are in the corpus."""
    bad_ids: list[str]
    """Images that were due and would not decode; the next one in the order stands in for each."""

    @property
    def num_bad(self) -> int:
        """Count the pictures that would not decode."""
        return len(self.bad_ids)


def batches(
    spec: FeedSpec,
    *,
    start_step: int,
    stop_step: int,
    rank: int,
    world_size: int,
    task_cpus: float,
    cpu_limit: float,
) -> Iterator[FeedBatch]:
    """Iterate over one worker's batches of steps start to stop, inside the training function.

    Worker `rank` receives `share_of` the pairs of every global batch, in their order. Nothing
    before `start_step` is read. Steps count on over epochs: epoch = step // steps_per_epoch.

    Args:
        spec: what a pair looks like; the same on all workers.
        start_step: first global step.
        stop_step: the step after the last one.
        rank: number of this worker.
        world_size: workers, at most one a pair.
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
        steps_per_epoch=steps_per_epoch(open_corpus(spec.corpus).num_images, spec.batch_size),
        task_cpus=task_cpus,
        cpu_limit=max(cpu_limit, task_cpus),
    )
    return _run(plan, start_step, stop_step)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one worker's share of every step is cut into tasks."""

    spec: FeedSpec
    parts: list[range]
    """Positions within the global batch, one range a task."""
    steps_per_epoch: int
    task_cpus: float
    cpu_limit: float


def _run(plan: Plan, start_step: int, stop_step: int) -> Iterator[FeedBatch]:
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


def _task(item: Block, *, spec: FeedSpec) -> Block:
    step, start, stop = (int(item[name][0]) for name in ("step", "start", "stop"))
    try:
        return prepare_block(spec, step=step, start=start, stop=stop)
    except InputError as error:
        # Ray keeps only the text of an exception: as data it arrives as what it is.
        return {"fault": np.array([str(error)], dtype=object)}


def _receive(plan: Plan, blocks: Iterator[Block], step: int) -> FeedBatch:
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
    return FeedBatch(
        step=step,
        epoch=step // plan.steps_per_epoch,
        images=columns["images"],
        token_ids=columns["token_ids"],
        masked_ids=columns["masked_ids"],
        mlm_labels=columns["mlm_labels"],
        image_keys=columns["image_keys"],
        image_ids=list(columns["image_ids"]),
        captions=list(columns["captions"]),
        bad_ids=[image_id for image_id in columns["bad_ids"] if image_id],
    )


def _check(block: Block, step: int, due: range) -> None:
    is_due = np.array_equal(block["position"], due) and bool((block["step"] == step).all())
    if not is_due:
        raise FeedOrderError(
            f"feed: step {step}, pairs {due.start} to {due.stop - 1} are due; step"
            f" {block['step'][0]}, pairs {block['position'][0]} to {block['position'][-1]} came."
            " Training on would break the plan: start again from the last checkpoint."
        )


def _store_bytes(plan: Plan) -> int:
    pictures = 3 * plan.spec.image_size**2 * max(len(part) for part in plan.parts)
    return max(MIN_STORE_BYTES, BLOCKS_IN_STORE * pictures)
