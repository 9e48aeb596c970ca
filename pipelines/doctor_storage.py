"""The doctor's look at where checkpoints go: writable, atomic, true to the bit, large enough."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import torch

from albef_core.model import ALBEF
from albef_core.teacher import Teacher
from pipelines.checkpoint_store import best_curve
from pipelines.config import PretrainConfig
from pipelines.doctor_finding import Finding, Problem

PROBE_BYTES = 4_000_000
FLOAT = 4
QUEUE_SLOT = 9
"""Bytes beside a slot's feature: image id and validity."""


def check_storage(config: PretrainConfig) -> Finding:
    """Write, rename and read back in the storage and where checkpoints go; weigh the room there."""
    places = {"--storage": str(config.storage)}
    if config.checkpoints:
        places["--checkpoints"] = config.checkpoints
    measured, problems = [], []
    for flag, place in places.items():
        try:
            rate = _try_url(place) if _is_remote(place) else _try_folder(_path(place))
            measured.append(f"{place}: written and read back at {rate:.0f} MB/s")
        except Exception as error:  # file systems behind URLs raise whatever they like
            measured.append(f"{place}: {(str(error) or type(error).__name__).splitlines()[0]}")
            problems.append(Problem("fail", _remedy(flag, place, error)))
    size = checkpoint_bytes(config)
    count = config.keep_last + 1 + bool(best_curve(config))
    measured.append(f"a checkpoint is {_bytes(size)}, and there are up to {count}")
    *_, place = places.values()
    if not problems and not _is_remote(place):
        free = shutil.disk_usage(_path(place)).free
        measured.append(f"{_bytes(free)} free")
        problems += _room_problems(place, free=free, needed=count * size)
    return Finding.of("; ".join(measured), problems)


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Count student, teacher, two AdamW moments of the student, and both queues, in fp32."""
    with torch.device("meta"):
        student = ALBEF(config.model)
        teacher = Teacher(config.model, student)
    own = sum(parameter.numel() for parameter in student.parameters())
    followed = sum(parameter.numel() for parameter in teacher.parameters())
    slot = FLOAT * config.model.feature_size + QUEUE_SLOT
    return FLOAT * (3 * own + followed) + 2 * config.objective.num_slots * slot


def _room_problems(place: str, *, free: int, needed: int) -> Iterator[Problem]:
    if free < needed:
        yield Problem(
            "fail",
            f"{place}: {_bytes(free)} free, {_bytes(needed)} needed. Make room, lower --keep-last,"
            " or give another --checkpoints.",
        )
    elif free < 2 * needed:
        yield Problem("warn", f"{place}: room for one run of this size, not for two.")


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.3g} MB"


def _remedy(flag: str, place: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{flag} {place}: install what its protocol needs ({error})."
    return f"{flag} {place} cannot be written: mend its rights, or give another {flag}."


def _is_remote(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


def _path(place: str) -> Path:
    return Path(place.removeprefix("file://"))


def _try_folder(folder: Path) -> float:
    """Write as a checkpoint is: beside its place, fsync, rename; give MB/s of the way and back."""
    folder.mkdir(parents=True, exist_ok=True)
    body = os.urandom(PROBE_BYTES)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
        partial, target = Path(scratch) / "probe.tmp", Path(scratch) / "probe"
        target.write_bytes(b"before")
        with partial.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(Path(scratch))
        _same(target.read_bytes(), body)
    return 2 * PROBE_BYTES / (time.perf_counter() - started) / 1e6


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_url(url: str) -> float:
    """Write, replace, list, read and remove an object; give MB/s of the way and back."""
    files, root = fsspec.core.url_to_fs(url)
    body = os.urandom(PROBE_BYTES)
    started = time.perf_counter()
    folder = f"{root}/.doctor-{os.urandom(4).hex()}"
    files.makedirs(folder, exist_ok=True)
    try:
        files.pipe_file(f"{folder}/probe", b"before")
        files.pipe_file(f"{folder}/probe", body)
        files.invalidate_cache()
        listed = [name.rsplit("/", 1)[-1] for name in files.ls(folder, detail=False)]
        if listed != ["probe"]:
            raise OSError(f"lists {listed} where one object was written")
        _same(files.cat_file(f"{folder}/probe"), body)
    finally:
        files.rm(folder, recursive=True)
    return 2 * PROBE_BYTES / (time.perf_counter() - started) / 1e6


def _same(found: bytes, written: bytes) -> None:
    if hashlib.sha256(found).digest() != hashlib.sha256(written).digest():
        raise OSError("gives back other bytes than were written")
