"""What a crawl's driver shows where the board of its actors is gone."""

import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from pipelines import crawl_progress
from pipelines.crawl_progress import View


def lost() -> None:
    raise RayError("the actor died")


def test_a_lost_board_and_a_stop_are_each_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crawl_progress, "SECONDS_BETWEEN_LOOKS", 0.01)
    board = SimpleNamespace(read=SimpleNamespace(remote=lost), stop=SimpleNamespace(remote=lost))
    view, is_stopped = View(board, total=3), threading.Event()
    is_stopped.set()
    crawl = threading.Thread(target=time.sleep, args=[0.2])
    crawl.start()

    view.watch(crawl, is_stopped)

    assert caplog.text.count("the board does not answer: the actor died") == 1
    assert caplog.text.count("asked to stop") == 1
    assert view.seen.num_ended == 0
