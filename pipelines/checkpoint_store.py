"""Where checkpoints lie: whole ones only, in a folder or behind an fsspec URL.

`state.json` comes last and goes first, so a folder without it is no checkpoint. A local folder
also appears under its name at once, by a rename, when the disk has all of it.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from albef_core.errors import InputError
from pipelines.checkpoint_files import (
    STATE_FILE,
    DamagedCheckpointError,
    Progress,
    State,
    check_files,
    encode_state,
    mark_file,
    read_state,
)
from pipelines.config import TrainConfig

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d{8,})(\.\d+)?")
"""The step; and a number where the same step has been written again."""
PARTIAL = re.compile(r"\.checkpoint-.+\.partial")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint whose every byte has been compared with what was written."""

    name: str
    url: str
    """Its folder, as fsspec takes it."""
    state: State

    @property
    def progress(self) -> Progress:
        """Give where the training was."""
        return self.state.progress

    @contextmanager
    def fetch(self) -> Iterator[Path]:
        """Give the files as a local folder; those from elsewhere are compared again, then removed.

        Raises:
            InputError: a file is not as it was when the checkpoint was found.
        """
        fs, folder = _connect(self.url)
        if isinstance(fs, LocalFileSystem):
            yield Path(folder)
            return
        with tempfile.TemporaryDirectory(prefix="albef-checkpoint-") as scratch:
            for name in (*self.state.files, STATE_FILE):
                fs.get_file(f"{folder}/{name}", f"{scratch}/{name}")
            try:
                check_files(LocalFileSystem(), scratch, self.state.files)
            except DamagedCheckpointError as error:
                raise InputError(f"{self.url}: {error}, after it was found whole.") from error
            yield Path(scratch)


def open_checkpoint(url: str) -> Found:
    """Open one checkpoint by its folder or fsspec URL.

    Raises:
        InputError: there is none, or a file of it is missing or damaged.
    """
    fs, folder = _connect(url)
    try:
        return _open(fs, folder)
    except DamagedCheckpointError as error:
        raise InputError(
            f"{url}: {error}. Give the folder of another checkpoint, or --resume newest."
        ) from error


class CheckpointStore:
    """The checkpoints of one training, written by one process at a time.

    Keeps the last `keep_last` written and the one whose metric `keep_best` is lowest. A location
    that cannot be used raises InputError.
    """

    def __init__(self, location: str, *, keep_last: int, keep_best: str = "") -> None:
        self.location = location
        self._keep_last, self._keep_best = keep_last, keep_best
        self._fs, self._root = _connect(location)

    def write(self, progress: Progress, fill: Callable[[Path], None]) -> str:
        """Write one checkpoint, whose files `fill` puts into a folder; return its name.

        The same step written again replaces what was there. What killed writers left is removed
        before, checkpoints no longer kept are removed after.
        """
        self._remove_leftovers()
        states = self._readable()
        name = self._free_name(progress.step)
        serial = 1 + max((state.serial for state in states.values()), default=0)
        scratch = self._scratch(name)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            fill(scratch)
            files = {path.name: mark_file(path) for path in sorted(scratch.iterdir())}
            state = State(progress=progress, files=files, serial=serial)
            (scratch / STATE_FILE).write_bytes(encode_state(state))
            mark_file(scratch / STATE_FILE)  # until the disk has it
            self._publish(scratch, name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._prune(states | {name: state})
        return name

    def newest_good(self, *, before: float = math.inf) -> Found | None:
        """Give the checkpoint written last that is whole, among those of fewer steps than `before`.

        A damaged one is logged and passed by.
        """
        states = self._readable(warn=True)
        states = {name: s for name, s in states.items() if s.progress.step < before}
        return self._first_whole(_by_age(states))

    def best(self) -> Found | None:
        """Give the whole checkpoint whose metric `keep_best` is lowest; None where none has it."""
        scores = self._scores(self._readable(warn=True))
        return self._first_whole(sorted(scores, key=lambda name: scores[name]))

    def _first_whole(self, names: Iterable[str]) -> Found | None:
        for name in names:
            try:
                return _open(self._fs, f"{self._root}/{name}")
            except DamagedCheckpointError as error:
                self._warn(name, error)
        return None

    def list_steps(self) -> list[int]:
        """List the steps that have a checkpoint, in order; damaged files are not noticed here."""
        names = [name for name in self._names() if self._has_state(name)]
        return sorted({_step_of(name) for name in names})

    def _names(self) -> list[str]:
        return [name for name in self._everything() if NAME.fullmatch(name)]

    def _everything(self) -> list[str]:
        self._fs.invalidate_cache()  # another process may have written
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, False)]
        except FileNotFoundError:
            return []

    def _has_state(self, name: str) -> bool:
        return self._fs.exists(f"{self._root}/{name}/{STATE_FILE}")

    def _readable(self, *, warn: bool = False) -> dict[str, State]:
        states = {}
        for name in self._names():
            try:
                states[name] = read_state(self._fs, f"{self._root}/{name}")
            except DamagedCheckpointError as error:
                if warn:
                    self._warn(name, error)
        return states

    def _warn(self, name: str, error: DamagedCheckpointError) -> None:
        logger.warning("%s/%s cannot be used: %s", self.location, name, error)

    def _free_name(self, step: int) -> str:
        name, again = f"checkpoint-{step:08d}", 0
        taken = self._names()
        while name in taken:
            again += 1
            name = f"checkpoint-{step:08d}.{again}"
        return name

    def _scratch(self, name: str) -> Path:
        if isinstance(self._fs, LocalFileSystem):
            return Path(self._root) / f".{name}.partial"  # beside it, so that a rename is enough
        owner = hashlib.sha256(f"{os.getuid()} {self.location}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"albef-checkpoint-{owner}"

    def _publish(self, scratch: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        if isinstance(self._fs, LocalFileSystem):
            _sync_folder(scratch)
            scratch.rename(target)
            _sync_folder(Path(self._root))
            return
        self._fs.makedirs(target, exist_ok=True)
        files = {path.name for path in scratch.iterdir()} - {STATE_FILE}
        for file in (*sorted(files), STATE_FILE):
            self._fs.put_file(str(scratch / file), f"{target}/{file}")

    def _remove_leftovers(self) -> None:
        for name in self._everything():
            is_half = NAME.fullmatch(name) and not self._has_state(name)
            if is_half or PARTIAL.fullmatch(name):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _prune(self, states: dict[str, State]) -> None:
        kept = set(_current(states)[: self._keep_last])
        if scores := self._scores(states):
            kept.add(min(scores, key=lambda name: scores[name]))
        for name in set(states) - kept:
            try:
                self._remove(name)
            except Exception as error:  # whatever a store may raise: the new checkpoint is safe
                logger.warning("%s/%s could not be removed (%s)", self.location, name, error)

    def _scores(self, states: Mapping[str, State]) -> dict[str, float]:
        found = {
            name: states[name].progress.metrics.get(self._keep_best) for name in _current(states)
        }
        return {name: s for name, s in found.items() if s is not None and math.isfinite(s)}

    def _remove(self, name: str) -> None:
        self._fs.rm_file(f"{self._root}/{name}/{STATE_FILE}")
        if self._fs.exists(f"{self._root}/{name}"):  # object stores have no empty folders
            self._fs.rm(f"{self._root}/{name}", recursive=True)


def _by_age(states: Mapping[str, State]) -> list[str]:
    """List checkpoints, the one written last first."""
    return sorted(states, key=lambda name: states[name].serial, reverse=True)


def _current(states: Mapping[str, State]) -> list[str]:
    """List of every step the checkpoint written last, the newest first."""
    newest_of_step = {_step_of(name): name for name in reversed(_by_age(states))}
    return [name for name in _by_age(states) if name == newest_of_step[_step_of(name)]]


def best_curve(config: TrainConfig) -> str:
    """Name the curve that marks the best checkpoint; "" where none is marked."""
    if config.keep_best is not None:
        return config.keep_best
    return "val/error" if config.val else "train/loss/total"


def open_store(config: TrainConfig) -> CheckpointStore:
    """Open where the checkpoints of a run lie.

    Raises:
        InputError: the location cannot be used.
    """
    root = config.checkpoints.rstrip("/") or str(config.storage)
    location = f"{root}/{config.name}"
    return CheckpointStore(location, keep_last=config.keep_last, keep_best=best_curve(config))


def _connect(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be opened ({error}).") from error
    return fs, path.rstrip("/")


def _open(fs: AbstractFileSystem, folder: str) -> Found:
    state = read_state(fs, folder)
    check_files(fs, folder, state.files)
    url = folder if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(folder)
    return Found(name=folder.rpartition("/")[2], url=url, state=state)


def _step_of(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match, "only names of checkpoints come here"
    return int(match[1])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
