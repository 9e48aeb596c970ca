"""Build a corpus from a crawl: clean, deal, copy the pictures, report; a run in MLflow tells it."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from albef_core.errors import InputError
from pipelines.cleaning_report import CleaningReport, draw_pairs, funnel, histogram
from pipelines.config_file import write_config
from pipelines.crawl_cleaning import Cleaned, clean
from pipelines.crawl_rows import CrawlRows, count_words, read_rows
from pipelines.crawl_shards import commit_planned, write_plan
from pipelines.crawl_store import Crawl, read_crawl
from pipelines.ingest import make_manifest, refuse_finished, remove_shards
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_report import REPORT_FOLDER, IngestReport, write_report
from pipelines.ingest_units import Summary, run_units
from pipelines.manifest import Manifest, read_manifest, write_manifest
from pipelines.records import Bad, count_bad
from pipelines.sources import refuse_flags
from pipelines.tracking import RunHandle, Tracker, metric_name, open_run

REMOVED_NAME = "removed.parquet"
NOT_FOR_CRAWLS = ("images", "annotations", "split", "num_images", "wrong_captions", "extra_words")

log = logging.getLogger(__name__)


def ingest_crawl(config: IngestConfig, *, on_progress: Callable[[int, int], None]) -> IngestReport:
    """Build the corpus `config.out` from the crawl `config.source`.

    The driver holds the ledger's columns, and no picture; Ray tasks read those, one task a shard.
    A corpus is never changed: a folder that has a manifest is refused. `on_progress` is told
    pictures done and their total.

    Raises:
        InputError: `out`, `source` or an excluded corpus will not do, the crawl has not ended,
            or too much of its store is unusable.
    """
    start = time.monotonic()
    refuse_finished(config.out)
    refuse_flags(config, "a crawl", *NOT_FOR_CRAWLS)
    crawl = read_crawl(Path(config.source).absolute())
    excluded = [read_manifest(folder) for folder in config.cleaning.exclude_corpus]
    remove_shards(config.out, "shard-*.parquet*")  # of an interrupted ingest
    run = _open_run(config)
    tracker = Tracker(run, skip_logged=False) if run else None
    try:
        report = _build(config, crawl, excluded, run, start, on_progress)
        if tracker:
            _log(tracker, report)
    except BaseException:
        if tracker:
            tracker.finish("FAILED")
        raise
    if tracker:
        tracker.finish()
    return report


def _build(
    config: IngestConfig,
    crawl: Crawl,
    excluded: list[Manifest],
    run: RunHandle | None,
    start: float,
    on_progress: Callable[[int, int], None],
) -> IngestReport:
    rows = read_rows(crawl)
    log.info("%s: %d pictures stored", crawl.folder, rows.pictures.num_rows)
    cleaned = clean(crawl, rows, config.cleaning, excluded)
    folder = config.out / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(cleaned.removed, folder / REMOVED_NAME)
    cleaning = CleaningReport(
        funnel=funnel(rows, cleaned.steps),
        failures=dict(rows.counts.failures.most_common()),
        hosts=rows.counts.hosts,
        sides=histogram(rows.pictures["smaller_side"].to_numpy()[cleaned.pictures]),
        words=histogram(count_words(cleaned.captions.flatten())),
        pairs=draw_pairs(crawl, rows, cleaned.pairs),
    )
    if not len(cleaned.pictures):
        write_report(IngestReport(folder=config.out, cleaning=cleaning), None)
        raise InputError(
            f"{config.source}: cleaning leaves no picture. {folder / 'report.md'} says which step"
            " takes how many; turn that step off, or crawl more."
        )
    summaries, bad = _copy(config, crawl, rows, cleaned, on_progress)
    told = {} if run is None else {"run_id": run.run_id, "tracking_uri": run.uri}
    manifest = make_manifest(config, summaries, **told)
    report = IngestReport(
        folder=config.out,
        content_id=manifest.content_id,
        num_images=manifest.num_images,
        num_captions=manifest.num_captions,
        num_shards=len(manifest.shards),
        sources=manifest.sources,
        bad_counts=count_bad(bad),
        bad=bad,
        cleaning=cleaning,
        seconds=round(time.monotonic() - start, 1),
    )
    write_report(report, manifest)
    write_config(config, config.out / "config.json")
    write_manifest(manifest)
    return report


def _copy(
    config: IngestConfig,
    crawl: Crawl,
    rows: CrawlRows,
    cleaned: Cleaned,
    on_progress: Callable[[int, int], None],
) -> tuple[list[Summary], list[Bad]]:
    """Write all shards; stop when too large a share of the pictures cannot be read."""
    out = config.out.resolve()
    plan, shards = write_plan(_planned(rows, cleaned), out, config)
    commit = partial(
        commit_planned, crawl=crawl, plan=plan, folder=out, rows_per_group=config.rows_per_group
    )
    summaries, bad, done, total = [], [], 0, len(cleaned.pictures)
    for summary in run_units(shards, commit):
        summaries.append(summary)
        bad += summary.bad
        done += summary.num_records
        on_progress(done, total)
        if len(bad) > config.max_bad_share * total:
            write_report(IngestReport(folder=out, bad_counts=count_bad(bad), bad=bad), None)
            raise InputError(
                f"{config.source}: {len(bad)} of {total} pictures ({len(bad) / total:.1%}) are not"
                f" in its store as its ledger says, more than --max-bad-share"
                f" {config.max_bad_share} allows. {out / REPORT_FOLDER / 'report.md'} names them;"
                " take the crawl from a copy."
            )
    remove_shards(out, "shard-*.parquet.*.tmp")  # of tasks whose worker died
    plan.unlink()
    return summaries, bad


def _planned(rows: CrawlRows, cleaned: Cleaned) -> pa.Table:
    """Lay out what is kept as `PLAN_SCHEMA` says."""
    kept = rows.pictures.take(pa.array(cleaned.pictures))

    def named(codes: pa.ChunkedArray, names: list[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(codes.combine_chunks(), pa.array(names, pa.string()))

    return pa.table(
        {
            "image_id": rows.image_ids(cleaned.pictures),
            "captions": cleaned.captions,
            "width": kept["width"],
            "height": kept["height"],
            "source": named(kept["list"], rows.lists),
            "url": kept["url"],
            "sha256": kept["sha256"],
            "phash": kept["phash"],
            "file": named(kept["file"], rows.files),
            "file_row": kept["shard_row"],
        }
    )


def _open_run(config: IngestConfig) -> RunHandle | None:
    """Open the run of this ingest; a corpus does without one when MLflow is away."""
    if not config.experiment:
        return None
    name = f"ingest-{config.out.absolute().name}"
    try:
        return open_run(config.experiment, None, run_name=name, params=config, tags={})
    except Exception as error:  # whatever ails MLflow, the corpus can be built
        log.warning("MLflow has no run of this ingest: %s", " ".join(str(error).split()))
        return None


def _log(tracker: Tracker, report: IngestReport) -> None:
    assert report.cleaning
    tracker.tag("corpus.id", report.content_id)
    counts = {f"left_out/{metric_name(r.name)}": r.num_removed for r in report.cleaning.funnel}
    failures = report.cleaning.failures.items()
    counts |= {f"failures/{metric_name(name)}": count for name, count in failures}
    counts |= {"images": report.num_images, "captions": report.num_captions}
    tracker.log({f"ingest/{name}": count for name, count in counts.items()}, step=0)
    for file in sorted((report.folder / REPORT_FOLDER).iterdir()):
        tracker.log_artifact(file, f"{REPORT_FOLDER}/{file.name}")
