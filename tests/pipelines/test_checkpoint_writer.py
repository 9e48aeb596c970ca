"""Checkpoints are written behind a training's back, and their trouble never stops it."""

import threading
import time
from pathlib import Path

import pytest

from pipelines.checkpoint_store import CheckpointStore
from pipelines.checkpoint_writer import BackgroundWriter, CheckpointError
from tests.pipelines.test_checkpoint_store import fill_with, progress_at


def test_the_writer_returns_at_once_and_writes_one_at_a_time(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep_last=3)
    writer, may_go_on, running = BackgroundWriter(store), threading.Event(), []

    def fill(folder: Path) -> None:
        running.append(1)
        assert may_go_on.wait(10)
        assert len(running) == 1
        fill_with(1)(folder)
        running.pop()

    writer.save(progress_at(1), fill)
    assert writer.is_busy
    assert store.list_steps() == []
    may_go_on.set()
    writer.save(progress_at(2), fill)
    writer.close()

    assert not writer.is_busy
    assert store.list_steps() == [1, 2]


def test_a_store_that_was_gone_for_a_while_gets_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    store = CheckpointStore(str(root), keep_last=3)
    root.write_text("a file where the folder should be")
    writer = BackgroundWriter(store, pauses_s=(0.05,) * 100)

    writer.save(progress_at(1), fill_with(1))
    while "trying again" not in caplog.text:
        time.sleep(0.01)
    root.unlink()
    while writer.is_busy:
        time.sleep(0.01)
    writer.close()

    assert store.list_steps() == [1]


def test_a_lost_checkpoint_is_an_error_only_when_it_is_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path / "run"), keep_last=3)
    writer = BackgroundWriter(store, pauses_s=(60.0,))

    def fail(folder: Path) -> None:
        raise OSError("no space left")

    writer.save(progress_at(1), fail)
    writer.save(progress_at(2), fill_with(2))
    writer.close()
    assert "step 1 could not be written" in caplog.text
    assert store.list_steps() == [2]

    writer.save(progress_at(3), fail)
    with pytest.raises(CheckpointError, match="no space left"):
        writer.close()
