"""How good the order of the feed mixes, against a uniform shuffle: `python -m benchmarks.shuffle`.

Prints a Markdown table, one row a corpus and window. Reads no data: the order depends on the
numbers of rows alone.
"""

import time
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import tyro
from numpy.typing import NDArray

from pipelines.order import WINDOW_GROUPS, epoch_order, steps_per_epoch

NUM_EPOCHS = 11
"""Ten pairs of epochs that follow each other."""
SAMPLED_IMAGES = 200
"""Images whose batch mates are counted one by one."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; all combinations of the first three."""

    images: tuple[int, ...] = (20_000, 1_000_000)
    """Rows of the corpus."""
    rows_per_group: tuple[int, ...] = (256, 32)
    """Rows of a row group."""
    window_groups: tuple[int, ...] = (1, WINDOW_GROUPS, 32, 64)
    """Row groups of a window."""
    batch_size: int = 512
    """Pairs of a global batch."""
    rows_per_task: int = 256
    """Pairs that one decoding task makes."""
    seed: int = 0
    """Seed of the order."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measured over all epochs; `uniform_...` is what a shuffle of the whole corpus gives."""

    duplicates: int
    """Rows that an epoch has twice, over all epochs."""
    correlation: float
    """Spearman's, of an image's place in two epochs that follow: mean of the absolute values."""
    worst_correlation: float
    uniform_correlation: float
    """Its standard deviation."""
    met_again: float
    """Of an image's batch mates, how many are batch mates in the next epoch too."""
    uniform_met_again: float
    group_mates: float
    """Of an image's batch mates, how many lie in its row group."""
    uniform_group_mates: float
    different_mates: float
    """Batch mates of an image over ten epochs, each counted once."""
    uniform_different_mates: float
    groups_of_batch: float
    """Row groups that one batch touches."""
    groups_of_task: float
    """Row groups that one task touches."""


def measure(
    group_rows: NDArray[np.int64],
    *,
    batch_size: int,
    rows_per_task: int,
    seed: int,
    window_groups: int,
) -> Quality:
    """Make eleven epochs of the order and compare them."""
    num_rows = int(group_rows.sum())
    num_steps = steps_per_epoch(num_rows, batch_size)
    orders = [
        epoch_order(group_rows, seed=seed, epoch=epoch, window_groups=window_groups)
        for epoch in range(NUM_EPOCHS)
    ]
    batches = [order[: num_steps * batch_size].reshape(num_steps, batch_size) for order in orders]
    group_of_row = np.repeat(np.arange(len(group_rows)), group_rows)
    batch_of_row = [_batch_of_row(batch, num_rows) for batch in batches]
    correlations = np.abs([_rank_correlation(*pair) for pair in pairwise(orders)])
    # The chance that two images share a batch, if every order of all rows is as likely.
    chance = num_steps * batch_size * (batch_size - 1) / (num_rows * (num_rows - 1))
    mates = batch_size - 1
    used = num_steps * batch_size / num_rows
    return Quality(
        duplicates=sum(num_rows - len(np.unique(order)) for order in orders),
        correlation=float(correlations.mean()),
        worst_correlation=float(correlations.max()),
        uniform_correlation=(num_rows - 1) ** -0.5,
        met_again=mates * float(np.mean([_met_again(*pair) for pair in pairwise(batch_of_row)])),
        uniform_met_again=mates * chance,
        group_mates=float(np.mean([_group_mates(group_of_row[batch]) for batch in batches])),
        uniform_group_mates=mates
        * float(np.average(group_rows - 1, weights=group_rows))
        / (num_rows - 1),
        different_mates=_different_mates(batches[1:], batch_of_row[1:], seed=seed),
        uniform_different_mates=(num_rows - 1)
        * (1 - (1 - used * mates / (num_rows - 1)) ** (NUM_EPOCHS - 1)),
        groups_of_batch=float(np.mean([_num_groups(group_of_row[batch]) for batch in batches])),
        groups_of_task=float(
            np.mean(
                [_num_groups(group_of_row[batch.reshape(-1, rows_per_task)]) for batch in batches]
            )
        ),
    )


def _batch_of_row(batches: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Tell in which batch each row is; -1 for those that the end of the epoch drops."""
    batch_of_row = np.full(num_rows, -1)
    batch_of_row[batches] = np.arange(len(batches))[:, None]
    return batch_of_row


def _rank_correlation(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Correlate the places of all rows in two orders; places are ranks already."""
    return float(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1])


def _met_again(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Give the share of the pairs of rows in one batch that are in one batch the next time too."""
    pairs = _count_pairs(first[first >= 0])
    both = (first >= 0) & (second >= 0)
    return _count_pairs(first[both] * (second.max() + 1) + second[both]) / pairs


def _count_pairs(labels: NDArray[np.int64]) -> float:
    sizes = np.unique(labels, return_counts=True)[1].astype(float)
    return float((sizes * (sizes - 1)).sum() / 2)


def _group_mates(groups: NDArray[np.int64]) -> float:
    """Count, for the mean image of these batches, the others of its row group in its batch."""
    num_batches, batch_size = groups.shape
    labels = groups + (groups.max() + 1) * np.arange(num_batches)[:, None]
    return 2 * _count_pairs(labels.ravel()) / (num_batches * batch_size)


def _different_mates(
    batches: list[NDArray[np.int64]], batch_of_row: list[NDArray[np.int64]], *, seed: int
) -> float:
    """Count, for some images, all the others that they share a batch with in any epoch."""
    rows = np.random.default_rng(seed).choice(len(batch_of_row[0]), SAMPLED_IMAGES, replace=False)
    counts = []
    for row in rows:
        places = zip(batches, batch_of_row, strict=True)
        met = [batch[of_row[row]] for batch, of_row in places if of_row[row] >= 0]
        counts.append(len(np.unique(np.concatenate(met))) - 1)
    return float(np.mean(counts))


def _num_groups(groups: NDArray[np.int64]) -> float:
    """Count the different row groups in each line; give the mean."""
    ordered = np.sort(groups, axis=1)
    return float(1 + (np.diff(ordered, axis=1) > 0).sum(axis=1).mean())


def main(options: Options) -> None:
    """Measure all combinations and print one line of the table for each."""
    print(
        "| images | rows of a group | groups of a window | doubles | rank correlation: mean, worst"
        " (uniform) | met again (uniform) | group mates (uniform) | mates in 10 epochs (uniform)"
        " | groups of a batch | rows read per row used |"
    )
    print("|" + " ---: |" * 10)
    started = time.perf_counter()
    for images, rows, window in product(
        options.images, options.rows_per_group, options.window_groups
    ):
        group_rows = np.full(-(-images // rows), rows)
        group_rows[-1] -= group_rows.sum() - images
        found = measure(
            group_rows,
            batch_size=options.batch_size,
            rows_per_task=options.rows_per_task,
            seed=options.seed,
            window_groups=window,
        )
        print(
            f"| {images:,} | {rows} | {window} | {found.duplicates}"
            f" | {found.correlation:.3f}, {found.worst_correlation:.3f}"
            f" ({found.uniform_correlation:.3f})"
            f" | {found.met_again:.2f} ({found.uniform_met_again:.2f})"
            f" | {found.group_mates:.1f} ({found.uniform_group_mates:.2f})"
            f" | {found.different_mates:,.0f} ({found.uniform_different_mates:,.0f})"
            f" | {found.groups_of_batch:.1f}"
            f" | {found.groups_of_task * rows / options.rows_per_task:.1f} |",
            flush=True,
        )
    print(f"\nbatch {options.batch_size}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Options))
