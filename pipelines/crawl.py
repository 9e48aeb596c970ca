"""URL lists to a store of pictures and a ledger of every row: the act of jobs/crawl.py."""

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data  # sets up its loggers, which connect() then turns down

from albef_core.errors import InputError, Preempted
from pipelines.cluster import connect, may_grow
from pipelines.config_file import write_config
from pipelines.crawl_config import CrawlConfig
from pipelines.crawl_failures import check_retry
from pipelines.crawl_listing import add_lists, choose_partitions, new_lists, settle_listing
from pipelines.crawl_progress import Progress, View, open_crawl_board
from pipelines.crawl_report import CrawlReport, make_report, report_body, write_crawl_report
from pipelines.crawl_store import CRAWL_NAME, PENDING, VERSION, Crawl, read_crawl, write_crawl
from pipelines.fetcher import Fetcher
from pipelines.ingest_report import REPORT_FOLDER
from pipelines.ledger import count_wanted, locked, partition_lock, recover
from pipelines.manifest import tool_version
from pipelines.progress import run_watched
from pipelines.url_lists import UrlList, find_list

LOCK_NAME = "crawl.lock"
SETTINGS = ("resize", "image_size", "jpeg_quality")
"""Fields that say what a picture of the store is."""
LOG_EVERY_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CrawlResult:
    """What a run has done, and how the whole crawl stands."""

    report: CrawlReport
    run_id: str
    """MLflow run; empty: none."""
    tracking_uri: str


def crawl(config: CrawlConfig) -> CrawlResult:
    """List what is new, fetch what is pending, and report how every row stands.

    Can be ended at any moment and goes on with the same command: only rows that had not been
    committed are fetched again. SIGTERM and Ctrl-C let what was fetched be committed first.

    Raises:
        InputError: a flag or a list will not do, or another process is at work on this crawl.
        Preempted: it was asked to stop.
    """
    check_retry(config.retry)
    lists = [_find(config, source) for source in config.source]
    if config.out.is_file():
        raise InputError(f"--out {config.out}: is a file. Choose a folder.")
    folder = config.out.absolute()
    is_new = not (folder / CRAWL_NAME).exists()
    if is_new and not lists:
        raise InputError(
            f"--source is missing: {config.out} is no crawl to go on with. Give a list."
        )
    with locked(folder / LOCK_NAME, wait_s=1.0):
        made = _begin(config, folder, lists) if is_new else _go_on(config, folder)
        fresh = new_lists(made, lists)
        if fresh:
            made = add_lists(made, fresh, on_progress=_logged_rows())
        for one in made.lists:
            log.info("%s: %d rows listed", one.name, one.num_rows)
        write_config(config, folder / "config.json")
        for partition in range(made.num_partitions):
            with partition_lock(made, partition):
                recover(made, partition)
        return _tracked(config, made)


def _find(config: CrawlConfig, source: str) -> UrlList:
    columns = {"url_column": config.url_column, "caption_column": config.caption_column}
    return find_list(source, **columns)


def _begin(config: CrawlConfig, folder: Path, lists: Sequence[UrlList]) -> Crawl:
    """Take a folder for a new crawl."""
    strangers = [one.name for one in folder.iterdir() if one.name != LOCK_NAME]
    if strangers:
        raise InputError(
            f"--out {config.out}: is no crawl, and holds {strangers[0]}. Choose another folder."
        )
    made = Crawl(
        version=VERSION,
        num_partitions=config.num_partitions or choose_partitions(lists),
        lists=(),
        settings={name: getattr(config, name) for name in SETTINGS},
        tool_version=tool_version(),
        folder=folder,
    )
    write_crawl(made)
    return made


def _go_on(config: CrawlConfig, folder: Path) -> Crawl:
    """Read a crawl that is there, and end what a killed run left half."""
    made = read_crawl(folder)
    for name, before in made.settings.items():
        now = getattr(config, name)
        if now != before:
            raise InputError(
                f"--{name.replace('_', '-')} {now}: {config.out} was begun with {before}, and one"
                " store holds one kind of picture. Leave it as it was, or choose another --out."
            )
    if config.num_partitions not in (None, made.num_partitions):
        raise InputError(
            f"--num-partitions {config.num_partitions}: {config.out} has {made.num_partitions},"
            " which stay. Leave the flag out."
        )
    settle_listing(folder, len(made.lists))
    return made


def _logged_rows() -> Callable[[int], None]:
    last = time.monotonic()

    def watch(num_rows: int) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_EVERY_S:
            last = time.monotonic()
            log.info("%d rows read from lists", num_rows)

    return watch


def _tracked(config: CrawlConfig, made: Crawl) -> CrawlResult:
    """Fetch and report; the counts go into the crawl's MLflow run, if there is to be one."""
    if not config.track:
        report = _fetch_and_report(config, made)
        return CrawlResult(report=report, run_id="", tracking_uri="")
    from pipelines import tracking  # noqa: PLC0415  # MLflow takes 2 s, and a crawl may do without

    run = tracking.open_run(
        config.experiment,
        made.folder,
        run_name=f"crawl-{tracking.metric_name(made.folder.name)}",
        params=config,
        tags={"crawl": str(made.folder)},
    )
    tracker = tracking.Tracker(run, skip_logged=False)
    try:
        report = _fetch_and_report(config, made)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, Preempted) else "FAILED")
        raise
    counts = {f"state/{name}": number for name, number in report.states.items()}
    counts |= {
        f"failure/{tracking.metric_name(name)}": number for name, number in report.failures.items()
    }
    tracker.log(counts, step=sum(report.states.values()) - report.states[PENDING])
    tracker.log_dict(report_body(report), "crawl/report.json")
    tracker.log_artifact(made.folder / REPORT_FOLDER / "report.html", "crawl/report.html")
    tracker.finish()
    return CrawlResult(report=report, run_id=run.run_id, tracking_uri=run.uri)


def _fetch_and_report(config: CrawlConfig, made: Crawl) -> CrawlReport:
    started = time.monotonic()
    wanted = count_wanted(made, config.retry)
    num_actors, seen = 0, Progress()
    if wanted:
        connect()
        num_actors = _num_actors(config, len(wanted))
        seen = _fetch(config, made, wanted, num_actors)
    report = make_report(
        made,
        num_fetched=seen.num_ended,
        cpus=num_actors * config.actor_cpus,
        seconds=time.monotonic() - started,
    )
    write_crawl_report(report)
    return report


def _num_actors(config: CrawlConfig, num_partitions: int) -> int:
    cpus = ray.cluster_resources().get("CPU", 0)
    room = int(cpus // config.actor_cpus)
    if (config.actors or 1) > room and not may_grow():
        raise InputError(
            f"--actors {config.actors or 1} at --actor-cpus {config.actor_cpus}: Ray has {cpus:g}"
            " CPUs, and they would wait for ever. Ask for less."
        )
    return min(config.actors or max(room, 1), num_partitions)


def _fetch(config: CrawlConfig, made: Crawl, wanted: dict[int, int], num_actors: int) -> Progress:
    """Let actors work on partitions, the largest first, until all are done.

    Raises:
        Preempted: it was asked to stop.
    """
    order = sorted(wanted, key=lambda partition: -wanted[partition])
    board = open_crawl_board()
    view = View(board, total=sum(wanted.values()))
    is_done = run_watched(
        lambda: _run_actors(config, made, order, num_actors, board),
        view.watch,
        *(signal.SIGTERM, signal.SIGINT),
    )
    if not is_done:
        raise Preempted(
            f"stopped: {view.seen.num_ended:,} rows of this run are committed in {config.out}."
            " The same command goes on."
        )
    return view.seen


def _run_actors(
    config: CrawlConfig, made: Crawl, order: list[int], num_actors: int, board: Any
) -> bool:
    # Dealt out like cards, so that each actor has as much to do as any other; a block is its share.
    dealt = [partition for first in range(num_actors) for partition in order[first::num_actors]]
    rows = [{"partition": partition} for partition in dealt]
    dataset = ray.data.from_items(rows, override_num_blocks=num_actors).map_batches(
        Fetcher,
        fn_constructor_args=(made, config, board),
        batch_size=None,
        num_cpus=config.actor_cpus,
        compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=1),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.target_max_block_size = None
    return all(row["is_done"] for row in dataset.iter_rows())
