"""Batches that were skipped because loss or gradient was not finite: which pairs they held."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class FlightRecorder:
    """Keeps a record of every skipped batch, and counts how many there are in a row.

    A training that goes on from a checkpoint repeats steps: a step has one record at most, the
    latest. With `folder` each record is also a file there at once, survives a kill, and is read
    back, so that what is in a row does not depend on where a training was interrupted.

    Args:
        folder: folder for the records; None: only in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._records: dict[int, dict[str, Any]] = {}
        self.in_a_row = 0
        """Batches skipped one after another up to the last one noted."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("step-*.json"):
                record = json.loads(file.read_text())
                self._records[record["step"]] = record

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Give the records in the order of steps."""
        return [self._records[step] for step in sorted(self._records)]

    def clear(self, step: int) -> None:
        """Note that a step went well; a record of it, from before a restart, is forgotten."""
        self.in_a_row = 0
        if self._records.pop(step, None) is not None and self._folder is not None:
            self._file(self._folder, step).unlink()

    def note(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        image_ids: Sequence[str],
        captions: Sequence[str],
    ) -> None:
        """Note that the batch of a step was skipped.

        JSON has no NaN and no infinity: such a loss or norm is recorded as its name.
        """
        self._records[step] = {
            "step": step,
            "loss": loss if math.isfinite(loss) else str(loss),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
            "image_ids": list(image_ids),
            "captions": list(captions),
        }
        self.in_a_row = 1
        while step - self.in_a_row in self._records:
            self.in_a_row += 1
        self._write(step)

    def artifact(self) -> dict[str, Any]:
        """Give all records as the body of the artifact `skipped_batches.json`."""
        return {"num_skipped": len(self._records), "skipped": self.skipped}

    def _write(self, step: int) -> None:
        if self._folder is None:
            return
        file = self._file(self._folder, step)
        partial = file.with_suffix(".tmp")
        with partial.open("w") as out:
            json.dump(self._records[step], out, indent=1)
            out.flush()
            os.fsync(out.fileno())  # or a node that dies could leave an empty file to read back
        partial.replace(file)

    @staticmethod
    def _file(folder: Path, step: int) -> Path:
        return folder / f"step-{step:08d}.json"
