"""How a crawl goes: its actors tell a board, and the driver shows it live or as lines of a log."""

import logging
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.crawl_store import OK

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 15.0
RATE_WINDOW_S = 30.0
SHOWN_FAILURES = 8


@dataclass
class Progress:
    """What a partition's worker has to tell since it last did; of a board, the sum of all."""

    ended: Counter[str] = field(default_factory=Counter)
    """Rows committed: `ok`, or the class of failure."""
    num_bytes: int = 0
    """Of bodies that came."""
    num_open: int = 0
    """URLs under way."""
    memory: int = 0
    """Resident bytes of the process; of a board, of all actors."""

    @property
    def num_ended(self) -> int:
        """Rows committed."""
        return self.ended.total()


@ray.remote(num_cpus=0)
class _CrawlBoard:
    """Adds up what the actors tell, and tells them to stop."""

    def __init__(self) -> None:
        self._ended, self._num_bytes = Counter[str](), 0
        self._now: dict[tuple[str, int], tuple[int, int]] = {}
        self._must_stop = False

    def note(self, process: tuple[str, int], progress: Progress) -> bool:
        """Take what an actor, known by node and process, tells; True: it is to stop."""
        self._ended += progress.ended
        self._num_bytes += progress.num_bytes
        self._now[process] = progress.num_open, progress.memory
        return self._must_stop

    def stop(self) -> None:
        """Ask the actors to commit what they have and end."""
        self._must_stop = True

    def read(self) -> Progress:
        """Give the sums."""
        num_open = sum(opened for opened, _memory in self._now.values())
        memory = sum(memory for _opened, memory in self._now.values())
        return Progress(self._ended, self._num_bytes, num_open, memory)


def open_crawl_board() -> Any:
    """Start a board on the driver's own node, whose loss is the run's end anyhow."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _CrawlBoard.options(scheduling_strategy=here).remote()


class View:
    """Shows a run: a table on a terminal, elsewhere a line every 15 seconds."""

    def __init__(self, board: Any, *, total: int) -> None:
        self._board, self._total = board, total
        self.seen = Progress()
        """What the board said last."""
        self._is_told = self._is_passed_on = self._is_lost = False
        self._points: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def watch(self, worker: threading.Thread, is_stopped: threading.Event) -> None:
        """Show the board until the worker thread ends, and pass a stop on to it."""
        console = Console(stderr=True)
        said_at = time.monotonic()
        with (
            Live(console=console, auto_refresh=False) if sys.stderr.isatty() else _Silent() as live
        ):
            while True:
                worker.join(timeout=SECONDS_BETWEEN_LOOKS)
                is_last = not worker.is_alive()
                self._look(is_stopped)
                self._add(self.seen)
                live.update(self._table(self.seen), refresh=True)
                is_due = time.monotonic() - said_at > SECONDS_BETWEEN_LINES
                if isinstance(live, _Silent) and (is_due or is_last):
                    said_at = time.monotonic()
                    logger.info("%s", self._line(self.seen))
                if is_last:
                    return

    def _look(self, is_stopped: threading.Event) -> None:
        if is_stopped.is_set() and not self._is_told:
            logger.warning("asked to stop: what was fetched is committed first")
            self._is_told = True
        try:
            if is_stopped.is_set() and not self._is_passed_on:
                ray.get(self._board.stop.remote(), timeout=5)
                self._is_passed_on = True
            found: Any = ray.get(self._board.read.remote(), timeout=5)
            self.seen = found
            self._is_lost = False
        except (RayError, TimeoutError) as error:
            # The view is not worth a crawl; a stop is tried again at the next look.
            if not self._is_lost:
                logger.warning("progress stands still here, the board does not answer: %s", error)
            self._is_lost = True

    def _add(self, seen: Progress) -> None:
        now = time.monotonic()
        self._points.append((now, seen.num_ended))
        while self._points[0][0] < now - RATE_WINDOW_S:
            self._points.pop(0)

    def _rate(self) -> float:
        (start, before), (end, after) = self._points[0], self._points[-1]
        return (after - before) / max(end - start, 1e-3)

    def _facts(self, seen: Progress) -> dict[str, str]:
        rate, left = self._rate(), self._total - seen.num_ended
        share = seen.ended[OK] / max(seen.num_ended, 1)
        return {
            "rows": f"{seen.num_ended:,} of {self._total:,}",
            "rate": f"{rate:,.0f} rows/s",
            "left": f"{left / rate / 60:,.1f} min" if rate else "?",
            "stored": f"{seen.ended[OK]:,} ({share:.0%})",
            "fetched": f"{seen.num_bytes / 1e6:,.0f} MB",
            "under way": f"{seen.num_open:,}",
            "memory": f"{seen.memory / 1e6:,.0f} MB",
        }

    def _failures(self, seen: Progress) -> list[tuple[str, int]]:
        failed = Counter({name: n for name, n in seen.ended.items() if name != OK})
        return failed.most_common(SHOWN_FAILURES)

    def _line(self, seen: Progress) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self._facts(seen).items())
        failures = ", ".join(f"{name} {number:,}" for name, number in self._failures(seen))
        return f"{facts}{'; failed: ' if failures else ''}{failures}"

    def _table(self, seen: Progress) -> Table:
        table = Table(*self._facts(seen), "failed most")
        failures = "\n".join(f"{name} {number:,}" for name, number in self._failures(seen))
        table.add_row(*self._facts(seen).values(), failures)
        return table


class _Silent:
    """Takes the place of a terminal's live table."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def update(self, _table: Table, *, refresh: bool) -> None:
        """Show nothing."""
