"""How far a run is: workers write it into an actor, the driver shows it as a bar or as lines."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SECONDS_BETWEEN_LINES = 15.0


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the newest step and its numbers; costs no CPU of the cluster."""

    def __init__(self) -> None:
        self.step = 0
        self.values: dict[str, float] = {}
        self.refusal = ""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Note that `step` steps are done."""
        self.step, self.values = step, dict(values)

    def read(self) -> tuple[int, dict[str, float]]:
        """Give what was written last."""
        return self.step, self.values

    def refuse(self, sentence: str) -> None:
        """Note a mistake of the user's that ends the run; a retry would meet it again."""
        self.refusal = sentence

    def read_refusal(self) -> str:
        """Give the mistake, or "" where there was none."""
        return self.refusal


def run_with_progress(work: Callable[[], Result], board: Any, *, title: str, total: int) -> Result:
    """Run `work` in a thread and show the board until it ends; return or raise what it does.

    On a terminal this is a bar; elsewhere (job logs) a line every 15 seconds.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # raised again in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    show = _bar if sys.stderr.isatty() else _lines
    show(thread, board, title, total)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _bar(thread: threading.Thread, board: Any, title: str, total: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, numbers="starting workers")
        while thread.is_alive():
            thread.join(timeout=0.5)
            step, values = _read(board)
            if step:
                progress.update(task, completed=step, numbers=_numbers(values))


def _lines(thread: threading.Thread, board: Any, title: str, total: int) -> None:
    said_at, said = time.monotonic(), 0
    while thread.is_alive():
        thread.join(timeout=0.5)
        step, values = _read(board)
        is_last = step == total
        is_due = time.monotonic() - said_at > SECONDS_BETWEEN_LINES
        if step > said and (is_due or is_last):
            logger.info("%s: step %d of %d, %s", title, step, total, _numbers(values))
            said_at, said = time.monotonic(), step


def _read(board: Any) -> tuple[int, dict[str, float]]:
    try:
        return ray.get(board.read.remote(), timeout=5)
    except (RayError, TimeoutError):
        return 0, {}  # the bar is not worth a training


def _numbers(values: Mapping[str, float]) -> str:
    return " ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in values.items())
