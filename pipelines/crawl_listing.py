"""Lists into a ledger: each row to its host's partition, and one row of a URL to be fetched."""

import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from albef_core.errors import InputError
from pipelines.crawl_failures import FAILURES, MALFORMED_ROW, SCHEME
from pipelines.crawl_store import (
    DUPLICATE,
    LEDGER_FOLDER,
    LEDGER_SCHEMA,
    PENDING,
    Crawl,
    Listed,
    write_crawl,
)
from pipelines.ledger import ROWS_PER_LEDGER_GROUP, is_any, ledger_groups, ledger_writer
from pipelines.url_lists import ListRow, UrlList
from pipelines.urls import (
    KEY_BYTES,
    BadUrlError,
    ForeignSchemeError,
    canonical_url,
    partition_of,
    url_key,
)

CHUNK_ROWS = 32_768
"""Rows of a list in memory at once."""
ROWS_PER_PARTITION = 20_000
BYTES_PER_ROW = 150
"""About what a listed row takes, where no one knows the number of rows."""
MIN_PARTITIONS, MAX_PARTITIONS = 4, 1024
_STAGED = re.compile(r"listing-(\d+)")
_STAGED_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.binary(KEY_BYTES)),
        ("host", pa.string()),
        ("failure", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """A row of a list with what its URL says."""

    key: bytes
    host: str
    failure: str | None = None
    detail: str | None = None


def choose_partitions(lists: Sequence[UrlList]) -> int:
    """Choose how many parts the hosts of these lists are dealt into, by the lists' bytes."""
    num_rows = sum(one.num_bytes for one in lists) / BYTES_PER_ROW
    return int(min(max(num_rows / ROWS_PER_PARTITION, MIN_PARTITIONS), MAX_PARTITIONS))


def new_lists(crawl: Crawl, lists: Sequence[UrlList]) -> list[UrlList]:
    """Leave out what the crawl has, and give the rest names that it does not have.

    Raises:
        InputError: a list has changed since it was listed.
    """
    known = {one.files: one for one in crawl.lists}
    names, fresh = {one.name for one in crawl.lists}, []
    for one in lists:
        before = known.get(tuple(map(str, one.files)))
        if before is None:
            number = 2
            name = one.name
            while name in names:
                name, number = f"{one.name}-{number}", number + 1
            names.add(name)
            fresh.append(replace(one, name=name))
        elif before.num_bytes != one.num_bytes:
            raise InputError(
                f"{one.files[0]}: has {one.num_bytes} bytes, and had {before.num_bytes} when it was"
                f" listed in {crawl.folder}. Give what is new as a file of its own."
            )
    return fresh


def settle_listing(folder: Path, num_lists: int) -> None:
    """End what an interrupted listing began: with `crawl.json` it holds, without it is undone."""
    for staged in folder.glob("listing-*"):
        match = _STAGED.fullmatch(staged.name)
        if match and int(match[1]) <= num_lists:
            _move(staged, folder)
        else:
            shutil.rmtree(staged)


def add_lists(
    crawl: Crawl, lists: Sequence[UrlList], *, on_progress: Callable[[int], None]
) -> Crawl:
    """Add every row of some lists to the ledger: all of them, or none if this is interrupted.

    Two passes: lists are cut into chunks that are sorted by partition, then each partition is
    written anew from its ledger and its part of every chunk. `on_progress` hears rows read.

    Raises:
        InputError: a list is damaged.
    """
    staged = crawl.folder / f"listing-{len(crawl.lists) + len(lists)}"
    (staged / "chunks").mkdir(parents=True)
    listed = list(crawl.lists)
    chunks: list[tuple[str, Path]] = []
    num_read = 0
    for one in lists:
        num_rows = 0
        for rows in _chunks(one):
            path = staged / "chunks" / f"{len(chunks):06d}.arrow"
            _write_chunk(path, rows, num_rows, crawl.num_partitions)
            chunks.append((one.name, path))
            num_rows += len(rows)
            on_progress(num_read + num_rows)
        num_read += num_rows
        files = tuple(map(str, one.files))
        listed.append(
            Listed(name=one.name, files=files, num_bytes=one.num_bytes, num_rows=num_rows)
        )
    for partition in range(crawl.num_partitions):
        target = staged / crawl.ledger(partition).name
        parts = [(name, _read_part(path, partition)) for name, path in chunks]
        _write_partition(target, crawl.ledger(partition), [p for p in parts if p[1].num_rows])
    shutil.rmtree(staged / "chunks")
    crawl = replace(crawl, lists=tuple(listed))
    write_crawl(crawl)
    _move(staged, crawl.folder)
    return crawl


def _move(staged: Path, folder: Path) -> None:
    for file in sorted(staged.glob("*.parquet")):
        target = folder / LEDGER_FOLDER / file.name
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
    shutil.rmtree(staged)


def _chunks(one: UrlList) -> Iterator[list[ListRow]]:
    rows = one.rows()
    while True:
        try:
            chunk = list(islice(rows, CHUNK_ROWS))
        except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
            raise InputError(
                f"{', '.join(map(str, one.files[:3]))}: damaged ({error}). Fetch the list again."
            ) from None
        if not chunk:
            return
        yield chunk


def _write_chunk(path: Path, rows: list[ListRow], start: int, num_partitions: int) -> None:
    """Write rows as one record batch a partition."""
    told = [_sort(row) for row in rows]
    partitions = np.array([partition_of(one.host, num_partitions) for one in told])
    table = pa.table(
        [
            pa.array(range(start, start + len(rows)), pa.int64()),
            pa.array([row.url for row in rows], pa.string()),
            pa.array([row.caption for row in rows], pa.string()),
            pa.array([one.key for one in told], pa.binary(KEY_BYTES)),
            pa.array([one.host for one in told], pa.string()),
            pa.array([one.failure for one in told], pa.string()),
            pa.array([one.detail for one in told], pa.string()),
        ],
        schema=_STAGED_SCHEMA,
    )
    table = table.take(pa.array(np.argsort(partitions, kind="stable")))
    bounds = np.searchsorted(np.sort(partitions), range(num_partitions + 1))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _STAGED_SCHEMA) as writer:
        for low, high in pairwise(bounds):
            part = table.slice(low, high - low).combine_chunks()
            batches = part.to_batches() or [pa.RecordBatch.from_pylist([], schema=_STAGED_SCHEMA)]
            writer.write_batch(batches[0])


def _read_part(path: Path, partition: int) -> pa.RecordBatch:
    # Opened every time: there may be more chunks than a process may have files open.
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(partition)


def _sort(row: ListRow) -> _Sorted:
    if row.problem:
        return _Sorted(url_key(row.url), "", MALFORMED_ROW, row.problem)
    try:
        url = canonical_url(row.url)
    except ForeignSchemeError as error:
        return _Sorted(url_key(row.url), "", SCHEME, str(error))
    except BadUrlError as error:
        return _Sorted(url_key(row.url), "", MALFORMED_ROW, str(error))
    return _Sorted(url.key, url.host)


def _write_partition(target: Path, before: Path, parts: list[tuple[str, pa.RecordBatch]]) -> None:
    """Write the rows that a partition had, then the new ones with their first state."""
    keys = [part["key"] for _name, part in parts]
    can_be_fetched = [part["failure"].is_null().to_numpy(zero_copy_only=False) for _, part in parts]
    known = [np.empty(0, dtype=f"V{KEY_BYTES}")]
    if before.exists():
        for group in ledger_groups(before, ["key", "failure"]):
            kept = ~is_any(group["failure"].combine_chunks(), (MALFORMED_ROW, SCHEME))
            known.append(_as_bytes(group["key"].combine_chunks())[kept])
    is_first = _first_of_key(
        np.concatenate(known), [_as_bytes(key) for key in keys], can_be_fetched
    )
    with ledger_writer(target) as writer:
        for group in ledger_groups(before) if before.exists() else ():
            writer.write_table(group, ROWS_PER_LEDGER_GROUP)
        for (name, part), fetched, first in zip(parts, can_be_fetched, is_first, strict=True):
            writer.write_table(_first_state(name, part, fetched, first), ROWS_PER_LEDGER_GROUP)


def _as_bytes(keys: pa.Array) -> np.ndarray:
    data = np.frombuffer(keys.buffers()[1] or b"", dtype=f"V{KEY_BYTES}")
    return data[keys.offset : keys.offset + len(keys)]


def _first_of_key(
    known: np.ndarray, keys: list[np.ndarray], can_be_fetched: list[np.ndarray]
) -> list[np.ndarray]:
    """Tell of each new row whether no row before it has its key."""
    every = np.concatenate([known, *keys]).view(np.uint64).reshape(-1, 2)
    counts = np.concatenate([np.ones(len(known), dtype=bool), *can_be_fetched])
    order = np.lexsort((np.arange(len(every)), ~counts, every[:, 0], every[:, 1]))
    is_new = np.ones(len(every), dtype=bool)
    is_new[1:] = (every[order[1:]] != every[order[:-1]]).any(axis=1)
    is_first = np.empty(len(every), dtype=bool)
    is_first[order] = is_new
    ends = np.cumsum([len(known), *map(len, keys)])
    return [is_first[low:high] for low, high in pairwise(ends)]


def _first_state(
    name: str, part: pa.RecordBatch, fetched: np.ndarray, first: np.ndarray
) -> pa.Table:
    failed = {kind: FAILURES[kind].state for kind in (MALFORMED_ROW, SCHEME)}
    usual = np.where(first, PENDING, DUPLICATE)
    states = [
        state if is_fetched else failed[kind]
        for state, is_fetched, kind in zip(usual, fetched, part["failure"].to_pylist(), strict=True)
    ]
    told = {
        **{column: part[column] for column in ("row", "url", "caption", "key", "host")},
        **{column: part[column] for column in ("failure", "detail")},
        "list": pa.array([name] * len(part)),
        "state": pa.array(states),
        "attempts": pa.array(np.zeros(len(part), dtype=np.int16)),
    }
    columns = [
        told[field.name].dictionary_encode().cast(field.type)
        if pa.types.is_dictionary(field.type) and field.name in told
        else told[field.name].cast(field.type)
        if field.name in told
        else pa.nulls(len(part), field.type)
        for field in LEDGER_SCHEMA
    ]
    return pa.table(columns, schema=LEDGER_SCHEMA)
