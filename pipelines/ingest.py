"""Build a corpus from a source: list, commit shard by shard, describe, report."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from albef_core.errors import InputError
from pipelines.config_file import write_config
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_report import IngestReport, write_report
from pipelines.ingest_units import Summary, Unit, commit_unit, run_units, shard_bounds, shard_name
from pipelines.manifest import (
    MANIFEST_NAME,
    SHARD_FOLDER,
    VERSION,
    Manifest,
    content_id,
    read_columns,
    read_rows,
    tool_version,
    write_manifest,
)
from pipelines.records import (
    CLIPPED,
    CROWD,
    EMPTY_CAPTION,
    NO_PARTNER,
    Bad,
    Listing,
    count_bad,
)
from pipelines.sources import list_records

LOG_EVERY_S = 5.0
# Classes that cost neither a picture nor what is asked of it.
HARMLESS = (EMPTY_CAPTION, CLIPPED, CROWD)

log = logging.getLogger(__name__)


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
