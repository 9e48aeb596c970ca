"""Writes checkpoints while training goes on, and never stops it for a store that fails."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.checkpoint_files import Progress
from pipelines.checkpoint_store import CheckpointStore

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """The last checkpoint of a training could not be written; the message says why."""


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread.

    A failed write is tried again after each of `pauses_s`; then it is logged and given up. Whoever
    waits for the writer ends the pauses: the next try is the last.
    """

    def __init__(
        self, store: CheckpointStore, *, pauses_s: tuple[float, ...] = (1.0, 5.0, 25.0)
    ) -> None:
        self._store, self._pauses_s = store, pauses_s
        self._thread: threading.Thread | None = None
        self._is_awaited = threading.Event()
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """Tell whether a write goes on, or waits to be tried again."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, progress: Progress, fill: Callable[[Path], None]) -> None:
        """Begin to write a checkpoint, when the one before is done with; `fill` runs in a thread.

        What `fill` writes must not change before `wait` returns or `is_busy` is false.
        """
        self.wait()
        self._is_awaited.clear()
        self._thread = threading.Thread(
            target=self._write, args=(progress, fill), name="checkpoint writer", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._is_awaited.set()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self.wait()
        if self._error is not None:
            raise CheckpointError(
                f"{self._store.location}: the last checkpoint could not be written"
                f" ({type(self._error).__name__}: {self._error})."
            ) from self._error

    def _write(self, progress: Progress, fill: Callable[[Path], None]) -> None:
        for pause_s in (*self._pauses_s, None):
            was_awaited = self._is_awaited.is_set()
            started = time.perf_counter()
            try:
                name = self._store.write(progress, fill)
            except Exception as error:  # full disks, lost stores: training is worth more
                self._error = error
            else:
                self._error = None
                seconds = time.perf_counter() - started
                logger.info("%s/%s written in %.1f s", self._store.location, name, seconds)
                return
            if pause_s is None or was_awaited:
                break
            logger.warning(
                "%s: step %d is not written yet, trying again (%s)",
                self._store.location,
                progress.step,
                self._error,
            )
            self._is_awaited.wait(pause_s)
        logger.error(
            "%s: step %d could not be written, training goes on without it (%s)",
            self._store.location,
            progress.step,
            self._error,
        )
