"""How far a job's stages are: bars on a terminal, a line every few seconds in a log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

logger = logging.getLogger("jobs.bars")
SECONDS_BETWEEN_LINES = 5.0

Show = Callable[[str, int, int], None]
"""Takes the stage, how much of it is done, and how much it is in all (0: not known)."""


@contextmanager
def progress_bars() -> Iterator[Show]:
    """Give a function that shows progress until the block ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=None)
            progress.update(bars[stage], completed=done, total=total or None)

        yield show


def _lines() -> Show:
    said_at, ended = time.monotonic(), set[str]()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal said_at
        is_end = done == total > 0 and stage not in ended
        if is_end or time.monotonic() - said_at > SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            ended.update([stage] * is_end)
            logger.info("%s: %d of %s done", stage, done, total or "?")

    return show
