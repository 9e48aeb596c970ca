"""Which images make up step t: a pure function of corpus, seed and epoch, blind to workers."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from albef_core.errors import InputError

ORDER_VERSION = 1
"""Rises when the same seed would give another order."""
WINDOW_GROUPS = 8
"""Row groups whose rows are mixed: a task that reads a batch touches about this many."""


class Stream(IntEnum):
    """What a random number is for; streams never overlap."""

    GROUPS = 0
    WINDOW = 1
    PAIR = 2
    CAPTIONS = 3


def generator(stream: Stream, *, seed: int, epoch: int, item: int = 0) -> np.random.Generator:
    """Make the generator of one (seed, epoch, item): the same numbers, whoever asks and when.

    Philox is counter-based: the key is (seed, item), and stream and epoch are the counter's high
    words, so streams are disjoint, and making one costs microseconds.
    """
    # As unsigned words: NumPy would round a list with a number beyond 63 bits to floats.
    key = np.array([seed % 2**64, item % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, int(stream), epoch]))


def epoch_order(
    group_rows: Sequence[int] | NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    window_groups: int = WINDOW_GROUPS,
) -> NDArray[np.int64]:
    """Put all rows of the corpus into the order of one epoch, each exactly once.

    Row groups are permuted over the whole corpus; `window_groups` neighbors of that permutation
    form a window, and rows are permuted inside it. So a reader touches few row groups at a time.

    Args:
        group_rows: rows of each row group, in the manifest's order.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        window_groups: row groups in a window.

    Returns:
        Global row numbers, counted over the row groups in the manifest's order.
    """
    stop = int(np.sum(group_rows))
    return epoch_slice(
        group_rows, start=0, stop=stop, seed=seed, epoch=epoch, window_groups=window_groups
    )


def epoch_slice(
    group_rows: Sequence[int] | NDArray[np.int64],
    *,
    start: int,
    stop: int,
    seed: int,
    epoch: int,
    window_groups: int = WINDOW_GROUPS,
) -> NDArray[np.int64]:
    """Compute positions start to stop of `epoch_order`, making only the windows that they touch."""
    rows = np.asarray(group_rows, dtype=np.int64)
    first_rows = np.cumsum(rows) - rows
    groups = generator(Stream.GROUPS, seed=seed, epoch=epoch).permutation(len(rows))
    window_starts = np.add.reduceat(rows[groups], np.arange(0, len(rows), window_groups))
    window_starts = np.concatenate([[0], np.cumsum(window_starts)])
    assert 0 <= start < stop <= window_starts[-1], "a slice lies inside the epoch"
    first = int(np.searchsorted(window_starts, start, side="right")) - 1
    last = int(np.searchsorted(window_starts, stop, side="left"))
    windows = []
    for window in range(first, last):
        members = groups[window * window_groups : (window + 1) * window_groups]
        inside = np.concatenate([first_rows[g] + np.arange(int(rows[g])) for g in members])
        generator(Stream.WINDOW, seed=seed, epoch=epoch, item=window).shuffle(inside)
        windows.append(inside)
    offset = int(window_starts[first])
    return np.concatenate(windows)[start - offset : stop - offset]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Count the whole global batches in an epoch.

    The remainder, `num_images % batch_size` images at the end of the order, is dropped; the order
    differs every epoch, so other images are dropped every time.

    Raises:
        InputError: the corpus does not fill one batch.
    """
    if num_images < batch_size:
        raise InputError(
            f"--batch-size {batch_size} is more than the {num_images} images of the corpus."
            f" Choose at most {num_images}, or ingest more images."
        )
    return num_images // batch_size
