"""Checkpoints are whole or not there, whatever kills the writer or changes the bytes."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from albef_core.errors import InputError
from pipelines.checkpoint_files import Progress
from pipelines.checkpoint_store import CheckpointStore, Found, open_checkpoint

REPOSITORY = Path(__file__).parents[2]
FILES = ("model.safetensors", "optimizer.pt", "state.json")
WRITER = """
import sys
from itertools import count
from pathlib import Path
from tests.pipelines.test_checkpoint_store import fill_with, progress_at
from pipelines.checkpoint_store import CheckpointStore

store = CheckpointStore(sys.argv[1], keep_last=1)
start = max(store.list_steps(), default=0)
for turn in count(2 * start):
    store.write(progress_at(1 + turn // 2), fill_with(turn))
    print("written", flush=True)
"""
"""Writes every step twice, keeps one checkpoint, and goes on where a killed one was."""


def progress_at(step: int, **metrics: float) -> Progress:
    return Progress(
        step=step,
        pairs_seen=step * 8,
        epoch=0,
        batch_size=8,
        seed=1,
        corpus_id="corpus",
        plan={"order": 1, "windows": [1, 2]},
        config_digest="digest",
        world_size=2,
        metrics=metrics,
        bad_ids=[],
        unsent=[{"key": "loss", "value": 0.5, "step": step}],
        versions={"torch": "2"},
    )


def fill_with(number: int) -> Callable[[Path], None]:
    """Fill a checkpoint with two files that agree with each other on one number."""

    def fill(folder: Path) -> None:
        for name in FILES[:2]:
            (folder / name).write_bytes(number.to_bytes(4, "big") * 5000)

    return fill


def number_in(found: Found) -> int:
    with found.fetch() as folder:
        first, second = ((folder / name).read_bytes() for name in FILES[:2])
    assert first == second
    return int.from_bytes(first[:4], "big")


@pytest.fixture(params=["folder", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's place: a local folder, or one that has neither renames nor real folders."""
    return str(tmp_path / "run") if request.param == "folder" else f"memory:/{tmp_path}"


def test_a_store_gives_back_the_progress_and_the_files_of_the_last_write(location: str) -> None:
    store = CheckpointStore(location, keep_last=2)

    store.write(progress_at(5), fill_with(5))
    name = store.write(progress_at(1200, loss=0.1), fill_with(77))

    found = store.newest_good()
    assert found is not None
    assert (found.name, name) == ("checkpoint-00001200",) * 2
    assert found.progress == progress_at(1200, loss=0.1)
    assert number_in(found) == 77
    assert store.list_steps() == [5, 1200]


def test_an_empty_store_has_no_checkpoint(location: str) -> None:
    store = CheckpointStore(location, keep_last=2)

    assert store.newest_good() is None
    assert store.best() is None
    assert store.list_steps() == []


def test_the_last_ones_and_the_best_are_kept(location: str) -> None:
    store = CheckpointStore(location, keep_last=2, keep_best="loss")

    for step, loss in enumerate([5.0, 1.0, float("nan"), 3.0, 4.0, 2.0]):
        store.write(progress_at(step, loss=loss), fill_with(step))

    assert store.list_steps() == [1, 4, 5]
    best = store.best()
    assert best is not None
    assert best.progress.step == 1


def test_a_step_written_again_replaces_the_old_one(location: str) -> None:
    store = CheckpointStore(location, keep_last=5)

    for number in (1, 2, 3):
        store.write(progress_at(7), fill_with(number))

    found = store.newest_good()
    assert found is not None
    assert number_in(found) == 3
    fs, root = fsspec.url_to_fs(location)
    assert len(fs.ls(root)) == 1


def test_newest_is_what_was_written_last_also_after_going_back(location: str) -> None:
    store = CheckpointStore(location, keep_last=2)
    for step in (100, 200, 300):
        store.write(progress_at(step), fill_with(step))

    store.write(progress_at(150), fill_with(150))

    found = store.newest_good()
    assert found is not None
    assert found.progress.step == 150
    assert store.list_steps() == [150, 300]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "too long", "differs"])
def test_damage_is_named_and_the_checkpoint_before_is_used(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(str(tmp_path), keep_last=3)
    store.write(progress_at(1), fill_with(1))
    store.write(progress_at(2), fill_with(2))
    spoil(tmp_path / "checkpoint-00000002" / name, damage)

    found = store.newest_good()

    if damage == "missing" and name == "state.json":  # then it is no checkpoint at all
        assert store.list_steps() == [1]
    assert found is not None
    assert found.progress.step == 1
    assert f"checkpoint-00000002 cannot be used: {name} " in caplog.text
    with pytest.raises(InputError, match=name):
        open_checkpoint(str(tmp_path / "checkpoint-00000002"))


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "too long":
        path.write_bytes(data + b"more")
    else:
        path.write_bytes(flipped(data, bit=len(data) * 4))


def flipped(data: bytes, *, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_goes_unseen(name: str, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep_last=3)
    store.write(progress_at(1), fill_with(1))
    path = tmp_path / "checkpoint-00000001" / name
    data, draw = path.read_bytes(), random.Random(0)

    for _ in range(100):
        path.write_bytes(flipped(data, bit=draw.randrange(8 * len(data))))
        assert store.newest_good() is None

    path.write_bytes(data)
    assert store.newest_good() is not None


def test_a_damaged_file_of_an_object_store_is_named(caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore("memory://damaged/run", keep_last=3)
    store.write(progress_at(1), fill_with(1))
    store.write(progress_at(2), fill_with(2))
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/damaged/run/checkpoint-00000002/optimizer.pt", b"short")

    found = store.newest_good()

    assert found is not None
    assert found.progress.step == 1
    assert "optimizer.pt is truncated (5 bytes of 20000)" in caplog.text


def test_one_checkpoint_opens_by_its_folder_or_url(location: str) -> None:
    store = CheckpointStore(location, keep_last=3)
    store.write(progress_at(1), fill_with(1))
    store.write(progress_at(2), fill_with(2))

    found = open_checkpoint(f"{location}/checkpoint-00000001/")

    assert found.progress.step == 1
    assert number_in(found) == 1


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: state\.json is missing"):
        open_checkpoint(str(tmp_path / "nowhere"))


def test_a_place_that_nothing_can_open_is_refused() -> None:
    with pytest.raises(InputError, match="nonsense://bucket"):
        CheckpointStore("nonsense://bucket", keep_last=1)


def test_a_failed_write_leaves_what_was_there(location: str) -> None:
    store = CheckpointStore(location, keep_last=1)
    store.write(progress_at(1), fill_with(1))

    def fail(folder: Path) -> None:
        fill_with(2)(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        store.write(progress_at(2), fail)

    assert store.list_steps() == [1]


def test_leftovers_of_killed_writers_go_with_the_next_write(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep_last=3)
    for name in (".checkpoint-00000001.partial", "checkpoint-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / "start").mkdir()

    store.write(progress_at(3), fill_with(3))

    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-00000003", "start"}


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    draw, newest = random.Random(1), -1
    store = CheckpointStore(str(tmp_path / "run"), keep_last=1)

    for _ in range(20):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()  # the first write of this process is done
            time.sleep(draw.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)

        found = store.newest_good()
        assert found is not None
        number = number_in(found)
        assert found.progress.step == 1 + number // 2
        assert number > newest
        newest = number


def test_a_found_checkpoint_that_changes_before_it_is_fetched_is_refused() -> None:
    store = CheckpointStore("memory://changed/run", keep_last=3)
    store.write(progress_at(1), fill_with(1))
    found = store.newest_good()
    assert found is not None
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/changed/run/checkpoint-00000001/optimizer.pt", b"x" * 20000)

    with pytest.raises(InputError, match=r"optimizer\.pt differs"), found.fetch():
        pass
