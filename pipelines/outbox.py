"""Calls that may fail and must not be waited for, made in order by a thread of their own."""

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Outbox:
    """Makes each call in turn until it succeeds, with growing pauses; the caller never waits.

    The first failure of an outage is logged, and its end. A call whose error `is_hopeless` is
    dropped and logged, because it would hold up all behind it for ever. Beyond `max_waiting` calls
    the oldest goes.
    """

    def __init__(
        self,
        receiver: str,
        *,
        is_hopeless: Callable[[Exception], bool] = lambda error: False,
        first_pause_s: float = 1.0,
        longest_pause_s: float = 60.0,
        max_waiting: int = 10_000,
    ) -> None:
        self._receiver = receiver
        self._is_hopeless = is_hopeless
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._max_waiting = max_waiting
        self._waiting: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._is_failing = self._is_closed = False
        threading.Thread(target=self._deliver, name=f"outbox {receiver}", daemon=True).start()

    def put(self, call: Callable[[], object]) -> None:
        """Queue one call; returns at once."""
        with self._changed:
            if len(self._waiting) == self._max_waiting:
                self._waiting.popleft()
                logger.warning("%s: too much waits for it, the oldest is lost", self._receiver)
            self._waiting.append(call)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all calls are made; give up early during an outage. True when none is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._is_failing, timeout_s)
            return not self._waiting

    def close(self, timeout_s: float) -> int:
        """Try on for at most `timeout_s`, then stop; return how many calls were never made."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)
            self._is_closed = True
            self._changed.notify_all()
            return len(self._waiting)

    def _deliver(self) -> None:
        pause_s = self._first_pause_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                call = self._waiting[0]
            error = self._try(call)
            with self._changed:
                if error is None or self._is_hopeless(error):
                    self._remove(call)
                    self._note_success(error)
                    pause_s = self._first_pause_s
                else:
                    self._note_failure(error)
                    self._changed.wait_for(lambda: self._is_closed, pause_s)
                    pause_s = min(2 * pause_s, self._longest_pause_s)
                self._changed.notify_all()

    def _try(self, call: Callable[[], object]) -> Exception | None:
        try:
            call()
        except Exception as error:  # noqa: BLE001, RUF100  # whatever a lost server looks like
            return error
        return None

    def _remove(self, call: Callable[[], object]) -> None:
        if self._waiting and self._waiting[0] is call:  # else `put` has already let go of it
            self._waiting.popleft()

    def _note_success(self, dropped_because: Exception | None) -> None:
        if dropped_because is not None:
            logger.warning("%s refuses what it was sent: %s", self._receiver, dropped_because)
        elif self._is_failing:
            logger.warning("%s answers again", self._receiver)
        self._is_failing = False

    def _note_failure(self, error: Exception) -> None:
        if not self._is_failing:
            logger.warning(
                "%s does not answer; the run goes on and sends later (%s)", self._receiver, error
            )
        self._is_failing = True
        self._changed.notify_all()
