"""Notices that no step ends any more, and says in which part of it the training is stuck."""

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Part = tuple[str, float]
"""Name of a part, and the monotonic time at which it began."""


class Watchdog:
    """Watches the thread that makes it, from a thread of its own.

    The limit counts from the making or from the last beat, whatever runs meanwhile. When it is
    over, once until the next beat, the stack of the watched thread is logged and `on_stuck`
    receives one sentence, in the watchdog's thread: it may end the process.

    Args:
        limit_s: seconds without a finished step that count as stuck.
        on_stuck: told the sentence.
        rank: number of this worker, for the sentence.
    """

    def __init__(self, limit_s: float, on_stuck: Callable[[str], None], *, rank: int) -> None:
        self._limit_s, self._on_stuck, self._rank = limit_s, on_stuck, rank
        self._watched = threading.get_ident()
        # Each is replaced whole by the watched thread and read once by the other: no lock.
        self._beat: tuple[int | None, float] = (None, time.monotonic())
        self._parts: tuple[Part, ...] = ()
        self._is_closed = threading.Event()
        threading.Thread(target=self._watch, name=f"watchdog {rank}", daemon=True).start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what runs inside the block: `data`, `step`, `collective`, `checkpoint`."""
        outer = self._parts
        self._parts = (*outer, (name, time.monotonic()))
        try:
            yield
        finally:
            self._parts = outer

    def beat(self, step: int) -> None:
        """Note that this step ended."""
        self._beat = (step, time.monotonic())

    def close(self) -> None:
        """Watch no longer."""
        self._is_closed.set()

    def _watch(self) -> None:
        reported = None
        while True:
            beat = self._beat
            # After a report, one whole limit: no later beat can be overdue before that.
            left_s = self._limit_s - (0 if beat is reported else time.monotonic() - beat[1])
            if self._is_closed.wait(max(left_s, 0)):
                return
            now = time.monotonic()
            if beat is not self._beat or beat is reported or now - beat[1] < self._limit_s:
                continue
            reported = beat
            sentence = describe_stall(self._rank, beat, self._parts, now)
            logger.error("%s\n%s", sentence, _stack(self._watched))
            self._on_stuck(sentence)


def describe_stall(
    rank: int, beat: tuple[int | None, float], parts: tuple[Part, ...], now: float
) -> str:
    """Say in one sentence where a worker is stuck, for how long, and since which step.

    Args:
        rank: number of the worker.
        beat: the last step that ended, None before the first, and when.
        parts: the parts it is in, the outermost first.
        now: time on the clock of `beat` and `parts`.
    """
    step, beat_at = beat
    where = " > ".join(name for name, _ in parts) or "none of the named parts"
    entered_at = parts[-1][1] if parts else beat_at
    since = "the start" if step is None else f"step {step}"
    return (
        f"rank {rank}: no step for {now - beat_at:.0f} s: stuck in {where} since {since}"
        f" ({now - entered_at:.0f} s)"
    )


def _stack(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame)) if frame else "the watched thread has ended"
