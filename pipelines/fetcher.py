"""The work on one partition: its rows fetched, checked and committed, many hosts at once."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Any

import cv2
import ray
from ray.exceptions import RayError

from pipelines.crawl_config import CrawlConfig
from pipelines.crawl_failures import find_failure
from pipelines.crawl_progress import Progress
from pipelines.crawl_store import OK, Crawl
from pipelines.host_queue import Attempt, HostLimits, HostQueue
from pipelines.http_client import Body, FetchError, HttpClient, check_opt_out
from pipelines.ledger import Journal, Wanted, fold, partition_lock, recover, wanted_rows
from pipelines.robots import Robots, origin_of
from pipelines.web_pictures import BadPictureError, PictureSpec, WebPicture, make_picture

PARTITIONS_AT_ONCE = 6
WINDOW_ROWS = 4096
"""Rows of a partition that wait in memory."""
COMMIT_BYTES = 24_000_000
"""Pictures in memory after which a commit does not wait for more."""
FOLD_ROWS = 65_536
"""Rows in the journal after which it joins the ledger."""
SECONDS_BETWEEN_REPORTS = 1.0
DETAIL_CHARS = 200
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


Report = Callable[[Progress], Awaitable[bool]]
"""Hears progress; True: the run is to stop."""


class Connections:
    """The connections of an actor, which its partitions share."""

    def __init__(self, most: int) -> None:
        self.num_open = 0
        self._most = most
        self._wakes: list[asyncio.Event] = []

    @property
    def is_free(self) -> bool:
        """Tell whether another may be opened."""
        return self.num_open < self._most

    def wake_me(self) -> asyncio.Event:
        """Give an event that is set when the last one that could be had is free again."""
        self._wakes.append(asyncio.Event())
        return self._wakes[-1]

    def close(self) -> None:
        """Note that one has ended."""
        was_free, self.num_open = self.is_free, self.num_open - 1
        for wake in () if was_free else self._wakes:
            wake.set()


class PartitionCrawl:
    """Fetches what a run wants of one partition.

    Ends when no row is left, or when `report` asks it to; then what was under way stays as it was
    before, and what had ended is committed.
    """

    def __init__(
        self,
        crawl: Crawl,
        partition: int,
        config: CrawlConfig,
        report: Report,
        connections: Connections,
    ) -> None:
        self._crawl, self._partition, self._config = crawl, partition, config
        self._report, self._connections = report, connections
        self._spec = PictureSpec(
            resize=config.resize,
            image_size=config.image_size,
            jpeg_quality=config.jpeg_quality,
            min_side=config.min_side,
        )
        limits = HostLimits(
            connections=config.connections_per_host,
            interval_s=config.host_interval_s,
            retries=config.retries,
            backoff_s=config.backoff_s,
            max_wait_s=config.max_wait_s,
        )
        self._queue = HostQueue(limits, random.Random(partition))
        self._wake = connections.wake_me()
        self._running: set[asyncio.Task[None]] = set()
        self._ended: list[dict[str, Any]] = []
        self._pictures: list[dict[str, Any]] = []
        self._picture_bytes = 0
        self._committed_at = time.monotonic()
        self._num_journaled = 0
        self._progress = Progress()
        self._must_stop = False
        self._defect: BaseException | None = None

    async def run(self, executor: Executor) -> bool:
        """Work until nothing is left or the run is to stop; tell whether nothing is left."""
        with partition_lock(self._crawl, self._partition):
            return await self._run(executor)

    async def _run(self, executor: Executor) -> bool:
        recover(self._crawl, self._partition)
        self._journal = Journal(self._crawl, self._partition)
        rows = wanted_rows(self._crawl.ledger(self._partition), self._config.retry)
        reporting = asyncio.create_task(self._keep_reporting())
        committing: asyncio.Task[None] | None = None
        is_done = False
        async with HttpClient(self._config) as client:
            robots = Robots(client, executor)
            while not self._must_stop:
                if self._defect is not None:
                    raise self._defect
                has_more = self._refill(rows)
                now = time.monotonic()
                while self._may_begin() and (attempt := self._queue.next(now)):
                    work = self._fetch(attempt, client, robots, executor)
                    task = asyncio.create_task(work)
                    self._running.add(task)
                    self._connections.num_open += 1
                    task.add_done_callback(self._on_done)
                for attempt, failure in self._queue.given_up():
                    self._end_badly(attempt, failure, _GIVEN_UP)
                if not self._queue.num_rows and not has_more:
                    is_done = True
                    break
                if (committing is None or committing.done()) and self._is_due():
                    if committing is not None:
                        committing.result()
                    committing = asyncio.create_task(self._commit())
                await self._sleep(now)
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
        if committing is not None:
            await committing
        await self._commit()
        reporting.cancel()
        await self._tell()
        await asyncio.to_thread(fold, self._crawl, self._partition)
        return is_done

    def _refill(self, rows: Iterator[Wanted]) -> bool:
        """Fill the window again once half of it is done; False: the partition has no more rows."""
        if self._queue.num_rows > WINDOW_ROWS // 2:
            return True
        now, before = time.monotonic(), self._queue.num_rows
        for row in islice(rows, WINDOW_ROWS - before):
            self._queue.add(row, origin_of(row.url), now)
        return self._queue.num_rows > before

    def _may_begin(self) -> bool:
        has_room = len(self._ended) < 2 * self._config.commit_rows
        has_memory = self._picture_bytes < 2 * COMMIT_BYTES
        return self._connections.is_free and has_room and has_memory

    async def _sleep(self, now: float) -> None:
        """Wait until a row ends, a host's time comes, or a commit is due."""
        waits = [SECONDS_BETWEEN_REPORTS, self._queue.wait_s(now) or SECONDS_BETWEEN_REPORTS]
        self._wake.clear()
        try:
            async with asyncio.timeout(min(waits)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._connections.close()
        self._wake.set()
        if not task.cancelled() and (error := task.exception()):
            self._defect = error

    async def _fetch(
        self, attempt: Attempt, client: HttpClient, robots: Robots, executor: Executor
    ) -> None:
        started = _now_ms()
        try:
            try:
                body = await self._get(attempt, client, robots)
            finally:
                self._queue.release(attempt, time.monotonic())
                self._wake.set()
        except FetchError as error:
            is_again = self._queue.failed(
                attempt,
                error.failure,
                now=time.monotonic(),
                wait_s=error.wait_s,
                is_elsewhere=error.is_elsewhere,
            )
            if not is_again:
                self._end(attempt, _failed(error), started)
            return
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(executor, make_picture, body.data, self._spec)
        except BadPictureError as error:
            told = {"failure": error.failure, "detail": str(error)}
        else:
            told = self._store(attempt.row, made)
        self._queue.ended(attempt, time.monotonic())
        self._end(
            attempt, {**told, "http_status": body.status, "num_bytes": body.num_bytes}, started
        )

    async def _get(self, attempt: Attempt, client: HttpClient, robots: Robots) -> Body:
        url = attempt.row.url
        check_hop = robots.check if self._config.obey_robots else None
        if check_hop is not None:
            await check_hop(url)
        return await client.get(
            url,
            max_bytes=self._config.max_bytes,
            check_hop=check_hop,
            check_headers=check_opt_out if self._config.obey_opt_out else None,
        )

    def _store(self, row: Wanted, made: WebPicture) -> dict[str, Any]:
        stored = {
            "sha256": made.sha256,
            "phash": made.phash,
            "width": made.width,
            "height": made.height,
        }
        self._pictures.append({"key": row.key, "image": made.image, **stored})
        self._picture_bytes += len(made.image)
        return {
            **stored,
            "original_width": made.original_width,
            "original_height": made.original_height,
            "shard_row": len(self._pictures) - 1,
        }

    def _end_badly(self, attempt: Attempt, failure: str, detail: str) -> None:
        self._end(attempt, {"failure": failure, "detail": detail}, _now_ms())

    def _end(self, attempt: Attempt, told: dict[str, Any], started: int) -> None:
        """Note that a row has ended; the next commit takes it."""
        row, failure = attempt.row, told.get("failure")
        detail = told.get("detail")
        entry = {
            **told,
            "position": row.position,
            "state": find_failure(failure).state if failure else OK,
            "detail": detail and detail[:DETAIL_CHARS],
            "attempts": min(row.attempts + attempt.tries, 2**15 - 1),
            "first_at": row.first_at or (started if attempt.tries else None),
            "last_at": _now_ms(),
        }
        self._ended.append(entry)

    def _is_due(self) -> bool:
        is_full = len(self._ended) >= self._config.commit_rows
        is_old = time.monotonic() - self._committed_at >= self._config.commit_s
        return is_full or self._picture_bytes >= COMMIT_BYTES or (is_old and bool(self._ended))

    async def _commit(self) -> None:
        ended, pictures = self._ended, self._pictures
        self._ended, self._pictures, self._picture_bytes = [], [], 0
        self._committed_at = time.monotonic()
        if not ended:
            return
        await asyncio.to_thread(self._write, ended, pictures)
        self._progress.ended.update(row.get("failure") or OK for row in ended)
        self._progress.num_bytes += sum(row.get("num_bytes") or 0 for row in ended)
        self._wake.set()

    def _write(self, ended: list[dict[str, Any]], pictures: list[dict[str, Any]]) -> None:
        self._journal.commit(ended, pictures)
        self._num_journaled += len(ended)
        if self._num_journaled >= FOLD_ROWS:
            fold(self._crawl, self._partition)
            self._num_journaled = 0

    async def _keep_reporting(self) -> None:
        while True:
            await self._tell()
            await asyncio.sleep(SECONDS_BETWEEN_REPORTS)

    async def _tell(self) -> None:
        told, self._progress = self._progress, Progress()
        told.num_open, told.memory = self._connections.num_open, _resident_bytes()
        if await self._report(told):
            self._must_stop = True
            self._wake.set()


_GIVEN_UP = "not tried: the host was given up in this run"


def _failed(error: FetchError) -> dict[str, Any]:
    return {
        "failure": error.failure,
        "detail": error.detail,
        "http_status": error.status,
        "num_bytes": error.num_bytes,
    }


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # no file on a disk
        return int(file.read().split()[1]) * PAGE_BYTES


class Fetcher:
    """The actor of Ray Data: some partitions at once, in one loop.

    The last rows of a partition may be slow hosts, which others need not wait for.
    """

    def __init__(self, crawl: Crawl, config: CrawlConfig, board: Any) -> None:
        cv2.setNumThreads(1)  # its own threads only get into each other's way
        self._crawl, self._config, self._board = crawl, config, board
        self._process = ray.get_runtime_context().get_node_id(), os.getpid()
        self._executor = ThreadPoolExecutor(config.actor_cpus, thread_name_prefix="decode")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work on the partitions of a batch; tell of each whether nothing is left of it."""
        partitions = [int(partition) for partition in batch["partition"]]
        return {"partition": partitions, "is_done": asyncio.run(self._work_on(partitions))}

    async def _work_on(self, partitions: list[int]) -> list[bool]:
        connections = Connections(self._config.connections)
        turns = asyncio.Semaphore(PARTITIONS_AT_ONCE)

        async def work(partition: int) -> bool:
            async with turns:
                crawl, config = self._crawl, self._config
                one = PartitionCrawl(crawl, partition, config, self._tell, connections)
                return await one.run(self._executor)

        return await asyncio.gather(*map(work, partitions))

    async def _tell(self, progress: Progress) -> bool:
        try:
            return await self._board.note.remote(self._process, progress)
        except RayError:
            return False  # a crawl that nobody can watch any more goes on
