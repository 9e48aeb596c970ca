"""Commit a corpus, one shard a Ray task: its records are read, checked and written."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data  # sets up its loggers, which connect() then turns down

from albef_core.preprocess import UndecodableImage, decode_image
from pipelines.annotations import Annotations, clip_boxes, count_annotations
from pipelines.cluster import connect
from pipelines.ingest_config import IngestConfig
from pipelines.manifest import Shard, write_shard
from pipelines.perceptual_hash import perceptual_hash
from pipelines.records import (
    EMPTY_CAPTION,
    NO_CAPTION,
    UNDECODABLE,
    Bad,
    BadRecordError,
    Record,
    clean_unicode,
)


@dataclass(frozen=True)
class Unit:
    """The work of one task: the records that become one shard."""

    name: str
    records: list[Record]


@dataclass(frozen=True)
class Summary:
    """What a task has done: its shard (None if no record was usable) and what was wrong."""

    shard: Shard | None
    num_records: int
    num_captions: int
    num_uncaptioned: int
    sources: dict[str, int]
    annotations: Counter[str]
    """Questions, statements, boxes and so on."""
    answers: set[str]
    """Distinct answers."""
    bad: list[Bad]


def shard_name(number: int) -> str:
    """Name the file of a shard."""
    return f"shard-{number:05d}.parquet"


def shard_bounds(num_rows: int, config: IngestConfig) -> list[tuple[int, int]]:
    """Cut rows into shards of whole row groups whose sizes differ by one row group at most."""
    size = min(config.rows_per_group, config.rows_per_shard)
    num_groups = -(-num_rows // size)
    num_shards = -(-num_groups // (config.rows_per_shard // size))
    first = [number * num_groups // num_shards * size for number in range(num_shards)]
    return list(pairwise([*first, num_rows]))


def run_units(units: Sequence[Any], commit: Callable[[Any], Summary]) -> Iterator[Summary]:
    """Commit every unit in a Ray task of its own; Ray repeats a task whose worker dies."""
    if not units:
        return
    connect()
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(_commit_batch, commit=commit), batch_size=None, batch_format="pyarrow"
    )
    for row in done.iter_rows():
        yield pickle.loads(row["summary"])


def _commit_batch(batch: pa.Table, *, commit: Callable[[Any], Summary]) -> pa.Table:
    summaries = [commit(pickle.loads(unit)) for unit in batch["unit"].to_pylist()]
    return pa.table({"summary": [pickle.dumps(summary) for summary in summaries]})


def commit_unit(unit: Unit, *, folder: Path, rows_per_group: int) -> Summary:
    """Write one shard. Doing it again gives the same shard under the same name."""
    bad: list[Bad] = []
    counts, annotated, answers = Counter[str](), Counter[str](), set[str]()
    num_captions = num_uncaptioned = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal num_captions, num_uncaptioned
        for record in unit.records:
            try:
                row, annotations = _row(record, bad)
            except BadRecordError as error:
                bad.append(Bad(error.kind, record.image_id, str(error)))
                continue
            counts[row["source"]] += 1
            annotated.update(count_annotations(annotations))
            answers.update(*(asked["answers"] for asked in annotations.get("questions", [])))
            num_captions += len(row["captions"])
            num_uncaptioned += not row["captions"]
            yield row

    shard = write_shard(folder, unit.name, rows(), rows_per_group=rows_per_group)
    return Summary(
        shard,
        len(unit.records),
        num_captions,
        num_uncaptioned,
        dict(counts),
        annotated,
        answers,
        bad,
    )


def _row(record: Record, bad: list[Bad]) -> tuple[dict[str, Any], Annotations]:
    """Read and check one record; what is left out of it is counted in `bad`.

    Raises:
        BadRecordError: it has no picture that decodes, or neither caption nor annotations.
    """
    entry = record.load()
    captions = [clean_unicode(text) for text in entry.captions]
    kept = [text for text in captions if text.strip()]
    bad += [Bad(EMPTY_CAPTION, record.image_id, "")] * (len(captions) - len(kept))
    if not kept and entry.annotations is None:
        raise BadRecordError(NO_CAPTION, "all its captions are empty")
    try:
        pixels = decode_image(entry.image)
    except UndecodableImage as error:
        raise BadRecordError(UNDECODABLE, str(error)) from None
    height, width = pixels.shape[:2]
    annotations: Annotations = json.loads(entry.annotations or "{}")
    bad += clip_boxes(annotations, width=width, height=height, name=record.image_id)
    row = {
        "image": entry.image,
        "image_id": record.image_id,
        "captions": kept,
        "width": width,
        "height": height,
        "source": record.image_id.partition(":")[0],
        "url": entry.url,
        "sha256": hashlib.sha256(entry.image).digest(),
        "phash": perceptual_hash(pixels),
        "split": record.split,
        "annotations": None if entry.annotations is None else json.dumps(annotations),
    }
    return row, annotations
