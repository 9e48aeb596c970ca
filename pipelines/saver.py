"""When a worker's training is written to a checkpoint, and how it is put back from one."""

import time
from functools import partial
from typing import Any

from albef_core.distributed import gather_objects, world_size
from albef_core.errors import InputError
from pipelines.checkpoint import SaveStudent, Snapshotter, TrainState, restore, write_snapshot
from pipelines.checkpoint_files import Progress, running_versions
from pipelines.checkpoint_store import open_store
from pipelines.checkpoint_writer import BackgroundWriter
from pipelines.config import TrainConfig
from pipelines.config_file import config_digest
from pipelines.curves import Curves
from pipelines.order import ORDER_VERSION, WINDOW_GROUPS


class Saver:
    """The checkpoints of a training, as one worker sees them: rank 0 writes, all read."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        curves: Curves,
        *,
        save: SaveStudent,
        text_layers: int,
        corpus_id: str,
        steps_per_epoch: int,
    ) -> None:
        self._config, self._state = config, state
        self._save, self._text_layers = save, text_layers
        self._curves, self._corpus_id, self._steps_per_epoch = curves, corpus_id, steps_per_epoch
        self._store = open_store(config)
        self._writer = BackgroundWriter(self._store)
        self._snapshotter = Snapshotter(state) if curves.tracker else None
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Tell whether steps or minutes ask for a checkpoint; not by time while one is written."""
        every, minutes = self._config.checkpoint_every, self._config.checkpoint_minutes
        if every and step % every == 0:
            return True
        is_late = 0 < minutes * 60 < time.monotonic() - self._saved_at
        return is_late and not self._writer.is_busy

    def save(self, step: int) -> None:
        """Copy the training off the device on rank 0; a thread writes it while training goes on."""
        self._saved_at = time.monotonic()
        if self._snapshotter is None or self._curves.tracker is None:
            return
        self._writer.wait()  # it reads the memory that the next snapshot goes to
        snapshot, config = self._snapshotter.take(), self._config
        progress = Progress(
            step=step,
            pairs_seen=step * config.batch_size,
            epoch=step // self._steps_per_epoch,
            batch_size=config.batch_size,
            seed=config.seed,
            corpus_id=self._corpus_id,
            plan=self._plan(),
            config_digest=config_digest(config),
            world_size=world_size(),
            metrics=self._curves.means_since_checkpoint(),
            bad_ids=self._curves.bad_ids.copy(),
            unsent=self._curves.tracker.unsent(),
            versions=running_versions(),
        )
        fill = partial(
            write_snapshot,
            snapshot,
            config=config,
            text_layers=self._text_layers,
            save=self._save,
        )
        self._writer.save(progress, fill)

    def restore(self) -> int:
        """Put everything where the newest good checkpoint left it; return the steps done.

        Rank 0 looks for it, and all load the same one (a collective).

        Raises:
            InputError: the checkpoint is of another order of the data.
        """
        (found, *_) = gather_objects(self._store.newest_good() if self._curves.tracker else None)
        if found is None:
            return 0
        if found.progress.plan != self._plan() and not self._config.force:
            raise InputError(
                f"{found.url}: made with another order of the data ({found.progress.plan} instead"
                f" of {self._plan()}). Give another --name, or --force."
            )
        with found.fetch() as folder:
            restore(folder, self._state)
        self._curves.bad_ids = found.progress.bad_ids.copy()
        if self._curves.tracker:
            self._curves.tracker.log_again(found.progress.unsent)
        return found.progress.step

    def newest(self, *, before: int) -> str:
        """Name the newest good checkpoint of fewer steps than `before`; "" where there is none."""
        self._writer.wait()
        found = self._store.newest_good(before=before)
        return found.url if found else ""

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._writer.wait()

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            CheckpointError: it could not be written.
        """
        self._writer.close()

    def _plan(self) -> dict[str, Any]:
        """Say what fixes the order of the data, beside the corpus."""
        return {
            "version": ORDER_VERSION,
            "seed": self._config.seed,
            "batch_size": self._config.batch_size,
            "window_groups": WINDOW_GROUPS,
            "steps_per_epoch": self._steps_per_epoch,
        }
