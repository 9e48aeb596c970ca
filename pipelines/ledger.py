"""The ledger of a crawl: its partitions, the journal of rows that ended, and how one joins another.

A picture file comes first, then the journal file that names it: what no journal and no ledger
names was never stored, and goes. Every file appears by rename.
"""

import fcntl
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from albef_core.errors import InputError
from pipelines.crawl_failures import is_retried
from pipelines.crawl_store import (
    FAILED,
    LEDGER_SCHEMA,
    PENDING,
    PICTURE_FOLDER,
    PICTURE_SCHEMA,
    REFUSED,
    ROWS_PER_GROUP,
    Crawl,
)
from pipelines.urls import canonical_url

LOCK_WAIT_S = 60.0
ROWS_PER_LEDGER_GROUP = 8192
"""Rows of the ledger in memory at once."""
KNOWN_WHEN_LISTED = ("list", "row", "url", "caption", "key", "host")
JOURNAL_SCHEMA = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),  # in the partition's ledger
        *(field for field in LEDGER_SCHEMA if field.name not in KNOWN_WHEN_LISTED),
    ]
)
"""What became of a row. Positions hold: a ledger is only ever added to at its end."""
LEDGER_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["list", "host", "state", "failure", "detail", "shard"],
    "write_statistics": ["state", "failure"],
}
PICTURE_OPTIONS: dict[str, Any] = {
    "compression": {name: "NONE" if name == "image" else "ZSTD" for name in PICTURE_SCHEMA.names},
    "use_dictionary": False,
    "write_statistics": False,
}
_NUMBER = re.compile(r"(\d{6})\.parquet$")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row that is to be fetched."""

    position: int
    url: str
    """In canonical form."""
    key: bytes
    attempts: int
    first_at: int | None
    """Of the first attempt, in milliseconds since 1970."""


@contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[None]:
    """Keep other processes out; the system lets go of the lock of one that dies.

    Raises:
        InputError: another one still has it after `wait_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{path}: another process is at work on this crawl. Wait for its end."
                    ) from None
                time.sleep(0.1)
        yield


def partition_lock(crawl: Crawl, partition: int) -> AbstractContextManager[None]:
    """Keep other processes off a partition: one that lost its driver lives on for a moment."""
    return locked(crawl.journal(partition).with_suffix(".lock"), wait_s=LOCK_WAIT_S)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a name to write to; at the end of the block it is made sure of, and becomes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def ledger_writer(target: Path) -> Iterator[pq.ParquetWriter]:
    """Write a partition's ledger, whole or not at all."""
    with (
        replacing(target) as partial,
        pq.ParquetWriter(partial, LEDGER_SCHEMA, **LEDGER_OPTIONS) as writer,
    ):
        yield writer


def ledger_groups(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read a partition's ledger in pieces of bounded size."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=None if columns is None else list(columns))


def wanted_rows(path: Path, retry: tuple[str, ...]) -> Iterator[Wanted]:
    """Give the rows of a partition that a run is to fetch: pending ones, and those to try again."""
    position = 0
    columns = ["url", "key", "host", "state", "failure", "attempts", "first_at"]
    for group in ledger_groups(path, columns):
        numbers = np.flatnonzero(wanted_mask(group, retry))
        table = group.take(pa.array(numbers))
        first_at = table["first_at"].cast(pa.int64()).to_pylist()
        told = (table[name].to_pylist() for name in ("url", "key", "attempts"))
        for number, url, key, attempts, first in zip(numbers, *told, first_at, strict=True):
            yield Wanted(position + int(number), canonical_url(url).text, key, attempts, first)
        position += len(group)


def wanted_mask(group: pa.Table, retry: tuple[str, ...]) -> np.ndarray:
    """Tell which rows of a piece of the ledger a run is to fetch."""
    state = group["state"].combine_chunks()
    is_wanted = is_any(state, {PENDING})
    if retry:
        failure = group["failure"].combine_chunks()
        known = [name for name in failure.dictionary.to_pylist() if name]
        again = {name for name in known if is_retried(name, retry)}
        has_url = np.array([host != "" for host in group["host"].to_pylist()], dtype=bool)
        is_wanted |= is_any(state, {FAILED, REFUSED}) & is_any(failure, again) & has_url
    return is_wanted


def is_any(names: pa.DictionaryArray, wanted: Collection[str]) -> np.ndarray:
    """Tell which of many names are among a few."""
    hits = np.array([name in wanted for name in names.dictionary.to_pylist()] + [False])
    indices = names.indices.fill_null(len(hits) - 1)
    return hits[indices.to_numpy(zero_copy_only=False)]


class Journal:
    """Commits what ended in one partition; used by one process at a time."""

    def __init__(self, crawl: Crawl, partition: int) -> None:
        self._crawl, self._partition = crawl, partition
        files = [*_pictures(crawl, partition), *crawl.journal(partition).glob("*.parquet")]
        matches = (_NUMBER.search(file.name) for file in files)
        self._last = max((int(match[1]) for match in matches if match), default=0)

    def commit(self, ended: list[dict[str, Any]], pictures: list[dict[str, Any]]) -> None:
        """Store pictures, then the rows that ended, which name them.

        `ended` are rows of JOURNAL_SCHEMA, whose `shard_row` is a row of `pictures` where they have
        one; `shard` is filled in here.
        """
        self._last += 1
        shard = f"part-{self._partition:04d}-{self._last:06d}.parquet"
        if pictures:
            table = pa.Table.from_pylist(pictures, schema=PICTURE_SCHEMA)
            with (
                replacing(self._crawl.pictures(shard)) as partial,
                pq.ParquetWriter(partial, PICTURE_SCHEMA, **PICTURE_OPTIONS) as writer,
            ):
                writer.write_table(table, ROWS_PER_GROUP)
        for row in ended:
            row["shard"] = None if row.get("shard_row") is None else shard
        table = pa.Table.from_pylist(ended, schema=JOURNAL_SCHEMA)
        folder = self._crawl.journal(self._partition)
        with replacing(folder / f"{self._last:06d}.parquet") as partial:
            pq.write_table(table, partial, compression="zstd")


def fold(crawl: Crawl, partition: int) -> None:
    """Bring the journal of a partition into its ledger. Doing it again changes nothing."""
    folder, target = crawl.journal(partition), crawl.ledger(partition)
    files = sorted(folder.glob("*.parquet"))
    if files:
        entries = pa.concat_tables([pq.read_table(file) for file in files])
        entries = _newest(entries)
        with ledger_writer(target) as writer:
            position = 0
            for group in ledger_groups(target):
                writer.write_table(_updated(group, position, entries), ROWS_PER_LEDGER_GROUP)
                position += len(group)
    if folder.exists():
        shutil.rmtree(folder)


def _newest(entries: pa.Table) -> pa.Table:
    """Sort by position, and keep the last entry of a row that has several."""
    positions = entries["position"].to_numpy()
    order = np.argsort(positions, kind="stable")
    last = np.append(np.diff(positions[order]) > 0, True)
    return entries.take(pa.array(order[last]))


def _updated(group: pa.Table, start: int, entries: pa.Table) -> pa.Table:
    positions = entries["position"].to_numpy()
    low, high = np.searchsorted(positions, [start, start + len(group)])
    if low == high:
        return group
    mask = np.zeros(len(group), dtype=bool)
    mask[positions[low:high] - start] = True
    part, columns = entries.slice(low, high - low), []
    for field in LEDGER_SCHEMA:
        column = group[field.name]
        if field.name not in KNOWN_WHEN_LISTED:
            plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            old, new = (
                column.cast(plain).combine_chunks(),
                part[field.name].cast(plain).combine_chunks(),
            )
            column = pc.call_function("replace_with_mask", [old, pa.array(mask), new])
            column = column.dictionary_encode() if plain != field.type else column
            column = column.cast(field.type)
        columns.append(column)
    return pa.table(columns, schema=LEDGER_SCHEMA)


def recover(crawl: Crawl, partition: int) -> None:
    """Bring a partition in order after a run that ended anyhow."""
    fold(crawl, partition)
    ledger = crawl.ledger(partition)
    for leftover in ledger.parent.glob(f"{ledger.name}.*.tmp"):
        leftover.unlink()
    stored = _pictures(crawl, partition)
    if stored:
        named: set[str] = set()
        for group in ledger_groups(ledger, ["shard"]):
            named.update(name for name in group["shard"].unique().to_pylist() if name)
        for file in stored:
            if file.name not in named:
                file.unlink()


def _pictures(crawl: Crawl, partition: int) -> list[Path]:
    return sorted((crawl.folder / PICTURE_FOLDER).glob(f"part-{partition:04d}-*"))


def count_wanted(crawl: Crawl, retry: tuple[str, ...]) -> dict[int, int]:
    """Count the rows to be fetched, of each partition that has some."""
    counts = Counter[int]()
    for partition in range(crawl.num_partitions):
        path = crawl.ledger(partition)
        if path.exists():
            for group in ledger_groups(path, ["state", "failure", "host"]):
                counts[partition] += int(wanted_mask(group, retry).sum())
    return {partition: count for partition, count in counts.items() if count}
