"""How far a run is: workers write it into an actor, the driver shows it as a bar or as lines."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_LOOKS = 0.5
Measured = tuple[int, dict[str, float]]
"""Steps done, and the curves `val/...` there."""
OnMeasured = Callable[[int, Mapping[str, float]], None]


@ray.remote(num_cpus=0)
class ProgressBoard:
    """What driver and workers tell each other during a run; costs no CPU of the cluster."""

    def __init__(self) -> None:
        self.step = 0
        self.values: dict[str, float] = {}
        self.refusal = ""
        self.notes: list[str] = []
        self.measured: list[Measured] = []
        self.must_stop = False
        self.must_save = False

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

    def note(self, sentence: str) -> None:
        """Leave a sentence for the driver's log."""
        self.notes.append(sentence)

    def take_notes(self) -> list[str]:
        """Give the sentences left since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def measure(self, step: int, values: Mapping[str, float]) -> None:
        """Note what held-out pictures say after `step` steps."""
        self.measured.append((step, dict(values)))

    def take_measured(self) -> list["Measured"]:
        """Give what was measured since the last call."""
        measured, self.measured = self.measured, []
        return measured

    def stop(self) -> None:
        """Ask the workers to leave a checkpoint and end."""
        self.must_stop = True

    def ask_checkpoint(self) -> None:
        """Ask the workers to leave a checkpoint and go on."""
        self.must_save = True

    def wants_checkpoint(self) -> bool:
        """Tell whether `ask_checkpoint` still waits for `note_checkpoint`."""
        return self.must_save

    def note_checkpoint(self) -> None:
        """Note that the checkpoint asked for is written."""
        self.must_save = False

    def read_wishes(self) -> tuple[bool, bool]:
        """Tell whether the workers are asked to stop, and whether for a checkpoint."""
        return self.must_stop, self.must_save


def open_board() -> Any:
    """Start a ProgressBoard on the driver's own node.

    Ray puts an actor without CPUs wherever it likes, and a training whose board is lost with some
    node is lost itself.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ProgressBoard.options(scheduling_strategy=here).remote()


def run_with_progress(
    work: Callable[[], Result],
    board: Any,
    *,
    title: str,
    total: int,
    on_measured: OnMeasured = lambda step, values: None,
) -> Result:
    """Run `work` in a thread and show the board until it ends; return or raise what it does.

    `on_measured` hears, in this thread, what held-out pictures say. On a terminal this is a bar;
    elsewhere (job logs) a line every 15 seconds. SIGTERM, which is pre-emption or `ray job stop`,
    is passed on to the board.
    """
    show = _bar if sys.stderr.isatty() else _lines

    def watch(thread: threading.Thread, is_stopped: threading.Event) -> None:
        show(thread, _Watch(board, is_stopped, on_measured), title, total)

    return run_watched(work, watch, signal.SIGTERM)


def run_watched(
    work: Callable[[], Result],
    watch: Callable[[threading.Thread, threading.Event], None],
    *signals: signal.Signals,
) -> Result:
    """Run `work` in a thread, and `watch` in this one until it ends; return or raise what it does.

    `watch` takes the thread, and an event that any of the signals sets.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # raised again in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    with _noted(*signals) as is_stopped:
        thread.start()
        watch(thread, is_stopped)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


@contextmanager
def _noted(*signals: signal.Signals) -> Iterator[threading.Event]:
    """Turn signals into an event. Ray installs handlers of its own, so this comes after it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = [signal.signal(one, lambda _number, _frame: asked.set()) for one in signals]
    try:
        yield asked
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)


class _Watch:
    """Reads the board twice a second: passes a stop on, logs notes and measurements."""

    def __init__(self, board: Any, is_stopped: threading.Event, on_measured: OnMeasured) -> None:
        self._board, self._is_stopped, self._on_measured = board, is_stopped, on_measured
        self._is_passed_on = False

    def read(self) -> tuple[int, dict[str, float]]:
        for step, values in self._take_measured():
            said = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            logger.info("step %d: %s", step, said)
            self._on_measured(step, values)
        try:
            if self._is_stopped.is_set() and not self._is_passed_on:
                logger.warning("asked to stop: the workers leave a checkpoint and end")
                ray.get(self._board.stop.remote(), timeout=5)
                self._is_passed_on = True
            for note in ray.get(self._board.take_notes.remote(), timeout=5):
                logger.warning("%s", note)
            return ray.get(self._board.read.remote(), timeout=5)
        except (RayError, TimeoutError):
            return 0, {}  # the bar is not worth a training

    def _take_measured(self) -> list[Measured]:
        try:
            return ray.get(self._board.take_measured.remote(), timeout=5)
        except (RayError, TimeoutError):
            return []


def _bar(thread: threading.Thread, watch: _Watch, title: str, total: int) -> None:
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
            thread.join(timeout=SECONDS_BETWEEN_LOOKS)
            step, values = watch.read()
            if step:
                progress.update(task, completed=step, numbers=_numbers(values))


def _lines(thread: threading.Thread, watch: _Watch, title: str, total: int) -> None:
    said_at, said = time.monotonic(), 0
    while thread.is_alive():
        thread.join(timeout=SECONDS_BETWEEN_LOOKS)
        step, values = watch.read()
        is_last = step == total
        is_due = time.monotonic() - said_at > SECONDS_BETWEEN_LINES
        if step > said and (is_due or is_last):
            logger.info("%s: step %d of %d, %s", title, step, total, _numbers(values))
            said_at, said = time.monotonic(), step


def _numbers(values: Mapping[str, float]) -> str:
    return " ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in values.items())
