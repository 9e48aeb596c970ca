"""Build a corpus: read, check and commit pictures with captions, one shard a Ray task."""

import hashlib
import json
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import ray.data  # sets up its loggers, which connect() then turns down

from albef_core.errors import InputError
from albef_core.preprocess import UndecodableImage, decode_image
from pipelines.annotations import Annotations, clip_boxes, count_annotations
from pipelines.cluster import connect
from pipelines.config_file import write_config
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_report import IngestReport, write_report
from pipelines.manifest import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    VERSION,
    Manifest,
    Shard,
    content_id,
    read_columns,
    read_rows,
    tool_version,
    write_manifest,
    write_shard,
)
from pipelines.records import (
    CLIPPED,
    CROWD,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_PARTNER,
    UNDECODABLE,
    Bad,
    BadRecordError,
    Listing,
    Record,
    clean_unicode,
    count_bad,
)
from pipelines.sources import list_records

LOG_EVERY_S = 5.0
# Classes that cost neither a picture nor what is asked of it.
HARMLESS = (EMPTY_CAPTION, CLIPPED, CROWD)

log = logging.getLogger(__name__)


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


def ingest(
    config: IngestConfig, *, on_progress: Callable[[int, int], None] | None = None
) -> IngestReport:
    """Build the corpus `config.out` from `config.source`.

    Bad flags are refused before Ray is asked for; a Ray that the caller has started is used.
    Rows are written in random order. Shards of an interrupted ingest are written again. A corpus is
    never changed: a folder that has a manifest is refused. `on_progress` is told pictures done and
    their total; without it both are logged.

    Raises:
        InputError: `out` or `source` will not do, or too much of the source is unusable.
    """
    start = time.monotonic()
    refuse_finished(config.out)
    listing = list_records(config)
    remove_shards(config.out, "shard-*.parquet*")  # of an interrupted ingest
    log.info("%s: %d pictures listed", config.source, len(listing.records))
    bad = list(listing.bad)
    _stop_if_mostly_bad(config, bad, listing)
    summaries = []
    watch = on_progress or logged_progress()
    done = 0
    commit = partial(commit_unit, folder=config.out.resolve(), rows_per_group=config.rows_per_group)
    for summary in run_units(_units(config, listing), commit):
        summaries.append(summary)
        bad += summary.bad
        done += summary.num_records
        watch(done, len(listing.records))
        _stop_if_mostly_bad(config, bad, listing)
    remove_shards(config.out, "shard-*.parquet.*.tmp")  # of tasks whose worker died
    manifest = make_manifest(config, summaries)
    annotations = sum((summary.annotations for summary in summaries), Counter[str]())
    bad += _broken_pairs(manifest) if bad and annotations["pairs"] else []
    report = IngestReport(
        folder=config.out,
        content_id=manifest.content_id,
        num_images=manifest.num_images,
        num_captions=manifest.num_captions,
        num_uncaptioned=manifest.num_uncaptioned,
        annotations=dict(annotations),
        num_answers=len(set[str]().union(*(summary.answers for summary in summaries))),
        num_shards=len(manifest.shards),
        sources=manifest.sources,
        bad_counts=count_bad(bad),
        bad=bad,
        seconds=round(time.monotonic() - start, 1),
    )
    if not manifest.num_images:
        write_report(report, None)
        raise InputError(f"{config.source}: not one usable picture. {_where(config, bad)}")
    write_report(report, manifest)
    write_config(config, config.out / "config.json")
    write_manifest(manifest)
    return report


def _broken_pairs(manifest: Manifest) -> list[Bad]:
    """Name the pairs whose left picture would not decode, maybe in another task than theirs."""
    ids = {name for table in read_columns(manifest, ["image_id"]) for name in table[0].to_pylist()}
    return [
        Bad(NO_PARTNER, image_id, f"{pair['left']}: {pair['sentence']}", is_entry=True)
        for image_id, text in read_rows(manifest, ["image_id", "annotations"])
        for pair in json.loads(text or "{}").get("pairs", [])
        if pair["left"] not in ids
    ]


def refuse_finished(out: Path) -> None:
    """Refuse to write over a corpus, or over a file.

    Raises:
        InputError: `out` is one of these.
    """
    if (out / MANIFEST_NAME).exists():
        raise InputError(
            f"--out {out}: holds a corpus already, and a corpus never changes."
            " Choose another folder, or remove this one first."
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file. Choose a folder.")


def remove_shards(out: Path, pattern: str) -> None:
    """Remove the shards of that name."""
    for leftover in (out / SHARD_FOLDER).glob(pattern):
        leftover.unlink()


def _units(config: IngestConfig, listing: Listing) -> list[Unit]:
    """Deal the records, shuffled, into units of about the same size and of whole row groups."""
    records = listing.records
    order = np.random.Generator(np.random.Philox(key=config.seed % 2**64)).permutation(len(records))
    return [
        Unit(shard_name(number), [records[i] for i in order[start:end]])
        for number, (start, end) in enumerate(shard_bounds(len(records), config))
    ]


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


def perceptual_hash(pixels: np.ndarray) -> int:
    """Hash what a uint8 RGB picture looks like: near-duplicates differ in few of the 64 bits.

    One bit for each of the lowest 8 x 8 frequencies of the 32 x 32 gray picture: is it above the
    median? (Zauner 2010, "pHash", section 3.2.1.)
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # without the mean of the picture
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def make_manifest(
    config: IngestConfig, summaries: Sequence[Summary], **more_settings: str
) -> Manifest:
    """Describe the corpus that the committed shards are; they are read for its content id."""
    shards = sorted(
        (summary.shard for summary in summaries if summary.shard), key=lambda shard: shard.name
    )
    sources = sum((Counter(summary.sources) for summary in summaries), Counter[str]())
    settings = {
        field.name: _setting(getattr(config, field.name))
        for field in fields(config)
        if field.name != "out"
    }
    settings |= more_settings
    manifest = Manifest(
        version=VERSION,
        content_id="",
        num_images=sum(shard.rows for shard in shards),
        num_captions=sum(summary.num_captions for summary in summaries),
        num_uncaptioned=sum(summary.num_uncaptioned for summary in summaries),
        rows_per_group=config.rows_per_group,
        sources=dict(sorted(sources.items())),
        settings=settings,
        tool_version=tool_version(),
        shards=tuple(shards),
        folder=config.out,
    )
    rows = read_rows(manifest, ["image_id", "sha256", "captions", "annotations"])
    return replace(manifest, content_id=content_id(rows))


def _setting(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _setting(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_setting(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _stop_if_mostly_bad(config: IngestConfig, bad: list[Bad], listing: Listing) -> None:
    """Refuse to go on when too large a share of the pictures or of their entries is bad."""
    listed = [one for one in listing.bad if one.kind not in HARMLESS]
    for what, is_entry, num_good in (
        ("pictures", False, len(listing.records)),
        ("entries", True, listing.num_entries),
    ):
        num_bad = sum(one.is_entry == is_entry and one.kind not in HARMLESS for one in bad)
        total = num_good + sum(one.is_entry == is_entry for one in listed)
        if num_bad <= config.max_bad_share * total:
            continue
        report = IngestReport(folder=config.out, bad_counts=count_bad(bad), bad=bad)
        write_report(report, None)
        raise InputError(
            f"{config.source}: {num_bad} of {total} {what} ({num_bad / max(total, 1):.1%}) are"
            f" unusable so far, more than --max-bad-share {config.max_bad_share} allows."
            f" {_where(config, bad)}"
        )


def _where(config: IngestConfig, bad: list[Bad]) -> str:
    counts = ", ".join(f"{count} x {kind}" for kind, count in count_bad(bad).items()) or "none bad"
    return f"Found: {counts}. {config.out / 'report' / 'report.md'} names them; mend the source."


def logged_progress() -> Callable[[int, int], None]:
    """Give a function that logs, every few seconds, how many pictures are done."""
    last = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > LOG_EVERY_S:
            last = time.monotonic()
            log.info("%d of %d pictures done", done, total)

    return watch
