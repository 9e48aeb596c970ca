"""From chosen rows of a crawl to shards of a corpus: the plan, and the task that fills a shard."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.crawl_store import ROWS_PER_GROUP, Crawl
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import Summary, shard_bounds, shard_name
from pipelines.manifest import write_shard
from pipelines.picture_files import UNREADABLE_FILE, read_images
from pipelines.records import DAMAGED, MISSING, UNREADABLE, Bad

PLAN_NAME = "plan.parquet"
PLAN_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("file", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("file_row", pa.int32(), nullable=False),
    ]
)
"""What a shard of the corpus will hold, and where its pictures are. One row group of the plan is
one shard."""


@dataclass(frozen=True)
class PlannedShard:
    """The work of one task: one row group of the plan."""

    name: str
    number: int


def write_plan(
    rows: pa.Table, folder: Path, config: IngestConfig
) -> tuple[Path, list[PlannedShard]]:
    """Deal rows of `PLAN_SCHEMA` to shards, and write them down as `folder`/plan.parquet.

    Whole row groups of the crawl are dealt, in random order, so that a task reads of the store what
    it needs and no more; only where two shards meet, both read one. Rows are permuted inside a
    shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = _deal(rows["file"], rows["file_row"].to_numpy(), config.seed)
    path, shards = folder / PLAN_NAME, []
    with pq.ParquetWriter(path, PLAN_SCHEMA, compression="ZSTD") as writer:
        for number, (start, end) in enumerate(shard_bounds(len(order), config)):
            mixed = _rng(config.seed, number + 1).permutation(order[start:end])
            writer.write_table(rows.take(pa.array(mixed)).cast(PLAN_SCHEMA), end - start)
            shards.append(PlannedShard(shard_name(number), number))
    return path, shards


def _deal(files: pa.ChunkedArray, file_rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    codes = files.combine_chunks().indices.to_numpy().astype(np.int64)
    most = 1 + int(file_rows.max(initial=0)) // ROWS_PER_GROUP
    _groups, group = np.unique(codes * most + file_rows // ROWS_PER_GROUP, return_inverse=True)
    place = _rng(seed, 0).permutation(len(_groups))
    return np.argsort(place[group], kind="stable")


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number]))


def commit_planned(
    shard: PlannedShard, *, crawl: Crawl, plan: Path, folder: Path, rows_per_group: int
) -> Summary:
    """Write one shard of the corpus in `folder`. Doing it again gives the same shard.

    A picture that the store has not, or not as the ledger says, is counted and left out.
    """
    with pq.ParquetFile(plan) as file:
        rows = file.read_row_group(shard.number)
    images, bad = _read_pictures(crawl, rows)
    sources, num_captions = Counter[str](), 0

    def whole() -> Iterator[dict[str, Any]]:
        nonlocal num_captions
        for number, row in enumerate(rows.drop(["file", "file_row"]).to_pylist()):
            if number not in images:
                continue
            sources[row["source"]] += 1
            num_captions += len(row["captions"])
            yield {**row, "image": images[number], "split": None, "annotations": None}

    written = write_shard(folder, shard.name, whole(), rows_per_group=rows_per_group)
    return Summary(
        shard=written,
        num_records=rows.num_rows,
        num_captions=num_captions,
        num_uncaptioned=0,
        sources=dict(sources),
        annotations=Counter(),
        answers=set(),
        bad=bad,
    )


def _read_pictures(crawl: Crawl, rows: pa.Table) -> tuple[dict[int, bytes], list[Bad]]:
    """Read the pictures of a plan's rows, by their place in it."""
    images: dict[int, bytes] = {}
    bad: list[Bad] = []
    files = rows["file"].combine_chunks()
    codes = files.indices.to_numpy()
    file_rows = rows["file_row"].to_numpy().astype(np.int64)
    ids, digests = rows["image_id"].to_pylist(), rows["sha256"].to_pylist()
    for code in np.unique(codes):
        places = np.flatnonzero(codes == code)
        path = crawl.pictures(files.dictionary[int(code)].as_py())
        try:
            for number, image in read_images(path, file_rows[places]):
                place = int(places[number])
                if hashlib.sha256(image).digest() == digests[place]:
                    images[place] = image
                else:
                    bad.append(Bad(DAMAGED, ids[place], f"{path} row {file_rows[place]}"))
        except FileNotFoundError:
            bad += [Bad(MISSING, ids[place], f"{path} is not there") for place in places]
        except UNREADABLE_FILE as error:
            lost = (place for place in places.tolist() if place not in images)
            bad += [Bad(UNREADABLE, ids[place], f"{path}: {error}") for place in lost]
    return images, bad
