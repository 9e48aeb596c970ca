"""The card of a registered model: where it comes from, what it said, what every file must be."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albef_core.errors import InputError
from pipelines.checkpoint_files import FileMark, read_mark, running_versions
from pipelines.config_file import read_config, write_config
from pipelines.leaks import LeakReport
from pipelines.manifest import Manifest

CARD_FILE = "card.json"
"""Beside `MLmodel`, the description that MLflow reads."""
CARD_TAG = "card.sha256"
"""Tag of the model and of its version: what the card itself must be."""
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt")
"""What a model folder's answers depend on."""


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a corpus is, without its pictures."""

    content_id: str
    folder: str
    """Where it lay, absolute."""
    num_images: int
    num_captions: int
    sources: dict[str, int]
    """Pictures by source."""

    @staticmethod
    def of(manifest: Manifest) -> "CorpusSummary":
        """Take what the manifest says."""
        return CorpusSummary(
            content_id=manifest.content_id,
            folder=str(manifest.folder.absolute()),
            num_images=manifest.num_images,
            num_captions=manifest.num_captions,
            sources=manifest.sources,
        )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a model comes from."""

    corpus: CorpusSummary
    recipe: str
    seed: int
    """Of weights, order of the data, and every random choice."""
    config: dict[str, Any]
    """All fields of the training."""
    git_commit: str
    environment: dict[str, str]
    """Versions, platform, and the device trained on."""
    metrics: dict[str, float]
    """Curves at the checkpoint that the model was taken from."""
    leaks: LeakReport | None
    """Of `--val` in the corpus; None where there was no `--val`."""
    checkpoint: dict[str, FileMark]
    """Files of the run's artifact `checkpoint/`, the whole training state; empty: not stored."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a model said when it was registered, so that it can be asked again."""

    inputs: list[dict[str, str]]
    """Rows of `ServedModel.predict`; pictures in base64."""
    outputs: list[dict[str, Any]]
    """What came of each."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is known of a registered model."""

    provenance: Provenance
    recorded: Recorded
    files: dict[str, FileMark]
    """Every other file of the MLflow model."""

    def write(self, path: Path) -> str:
        """Write the card as JSON; return the SHA-256 of the file."""
        write_config(self, path)
        return read_mark(path).sha256


def read_card(path: Path, *, sha256: str, whose: str) -> Card:
    """Read a card that must have this SHA-256.

    Raises:
        InputError: it is missing or has changed.
    """
    found = read_mark(path).sha256 if path.is_file() else "none"
    if found != sha256:
        raise InputError(f"{whose}: {CARD_FILE} has sha256 {found}, recorded was {sha256}. {HELP}")
    return read_config(path, Card)


def environment(device: str) -> dict[str, str]:
    """Say what a training runs on."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return running_versions() | system | {"device": device}


def marks_of(folder: Path) -> dict[str, FileMark]:
    """Mark every file below a folder, by its path there; bytecode is nobody's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): read_mark(path)
        for path in files
        if "__pycache__" not in path.parts
    }


HELP = "Restore the file from a copy, or take another version."


def check_marks(folder: Path, marks: Mapping[str, FileMark], *, whose: str) -> None:
    """Compare the files of a folder with their marks, sizes first.

    Raises:
        InputError: one is missing or differs; it is named, with what was recorded and found.
    """
    for name, mark in marks.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != mark.bytes:
            what = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"{whose}: {name} {what}, recorded were {mark.bytes} bytes. {HELP}")
    for name, mark in marks.items():
        if (sha256 := read_mark(folder / name).sha256) != mark.sha256:
            raise InputError(
                f"{whose}: {name} has sha256 {sha256}, recorded was {mark.sha256}. {HELP}"
            )


def model_digest(model: Path) -> str:
    """Hash weights, sizes and vocabulary of a model folder or official file, wherever it lies."""
    files: Sequence[Path] = [model, model.with_name("vocab.txt")]
    if model.is_dir():
        files = [model / name for name in MODEL_FILES]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
