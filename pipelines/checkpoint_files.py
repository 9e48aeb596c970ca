"""The files of one checkpoint: what marks each as whole, and the sealed `state.json` of them all.

Imports no torch: the store that uses it runs in drivers and in tests of killed writers.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem

STATE_FILE = "state.json"
FORMAT = 1
CHUNK_BYTES = 1 << 20


class DamagedCheckpointError(Exception):
    """A checkpoint is not as it was written; the message names the file and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training was, and what it was: all that goes on besides tensors; plain JSON."""

    step: int
    pairs_seen: int
    epoch: int
    batch_size: int
    seed: int
    corpus_id: str
    plan: dict[str, Any]
    """What fixes the order of the data."""
    config_digest: str
    world_size: int
    metrics: dict[str, float]
    bad_ids: list[str]
    """Pictures that did not decode so far."""
    unsent: list[Any]
    """Metric points that the tracking server does not have yet."""
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class FileMark:
    """What a file must be: its size, and the SHA-256 of its bytes in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class State:
    """What `state.json` says."""

    progress: Progress
    files: dict[str, FileMark]
    """Marks of all other files."""
    serial: int
    """Rises with every checkpoint written to a store. The newest is not always that of the highest
    step: a training may have been resumed from an older one."""


def running_versions() -> dict[str, str]:
    """Give the versions of the packages that the numbers of a training depend on."""
    return {name: version(name) for name in ("torch", "ray", "mlflow")}


def read_mark(path: Path) -> FileMark:
    """Read a file once for its mark."""
    with path.open("rb", buffering=0) as file:
        return _mark(file)


def mark_file(path: Path) -> FileMark:
    """Read a file once for its mark, then wait until the disk has it."""
    with path.open("rb", buffering=0) as file:
        mark = _mark(file)
        os.fsync(file.fileno())
    return mark


def check_files(fs: AbstractFileSystem, folder: str, marks: Mapping[str, FileMark]) -> None:
    """Read all files of a checkpoint and compare them with their marks, sizes first.

    Raises:
        DamagedCheckpointError: a file is missing, of another size, or has other bytes.
    """
    for name, mark in marks.items():
        size = _read(fs.size, f"{folder}/{name}")
        if size != mark.bytes:
            how = "is truncated" if size < mark.bytes else "is too long"
            raise DamagedCheckpointError(f"{name} {how} ({size} bytes of {mark.bytes})")
    for name, mark in marks.items():
        if _read(lambda path: _mark_at(fs, path), f"{folder}/{name}") != mark:
            raise DamagedCheckpointError(f"{name} differs from what was written (its sha256)")


def read_state(fs: AbstractFileSystem, folder: str) -> State:
    """Read a checkpoint's `state.json`.

    Raises:
        DamagedCheckpointError: it is missing, cut short, changed, or of another version.
    """
    return decode_state(_read(fs.cat_file, f"{folder}/{STATE_FILE}"))


def _read(reader: Callable[[str], Any], path: str) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path.rpartition('/')[2]} is missing") from None


def _mark_at(fs: AbstractFileSystem, path: str) -> FileMark:
    with fs.open(path, "rb") as file:
        return _mark(cast("BinaryIO", file))


def _mark(file: BinaryIO) -> FileMark:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return FileMark(bytes=size, sha256=digest.hexdigest())


def encode_state(state: State) -> bytes:
    """Write `state.json`; its seal covers everything else in it."""
    body = asdict(state.progress) | {
        "files": {name: asdict(mark) for name, mark in state.files.items()},
        "serial": state.serial,
        "format": FORMAT,
    }
    return json.dumps(body | {"seal": _seal(body)}, indent=1).encode() + b"\n"


def decode_state(text: bytes) -> State:
    """Read what `encode_state` wrote.

    Raises:
        DamagedCheckpointError: it is cut short, changed, or of another version.
    """
    try:
        body = json.loads(text)
    except ValueError:
        raise DamagedCheckpointError(f"{STATE_FILE} is truncated or damaged") from None
    seal = body.pop("seal", None) if isinstance(body, dict) else None
    if seal is None:
        raise DamagedCheckpointError(f"{STATE_FILE} has no seal: it is another version's")
    if seal != _seal(body):
        raise DamagedCheckpointError(f"{STATE_FILE} differs from what was written (its seal)")
    if body.pop("format") != FORMAT:
        raise DamagedCheckpointError(f"{STATE_FILE} is another version's")
    files = {name: FileMark(**mark) for name, mark in body.pop("files").items()}
    serial = body.pop("serial")
    return State(progress=Progress(**body), files=files, serial=serial)


def _seal(body: dict[str, Any]) -> str:
    # By way of JSON, as a reader sees it: tuples become lists, and numbers as keys become strings.
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
