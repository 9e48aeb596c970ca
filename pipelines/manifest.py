"""The corpus on disk: Parquet shards, and the manifest that lists and identifies them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from albef_core.errors import InputError

VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_FOLDER = "shards"

SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("annotations", pa.string()),
    ]
)

# Pictures are compressed already, and every one is different.
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names},
    "use_dictionary": ["source", "split"],
    "write_statistics": ["image_id"],
}


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a corpus; `name` is relative to the folder `shards`."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RowGroup:
    """One row group: the unit in which a corpus is read."""

    shard: str
    index: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus is: its identity, its counts, where it came from, and its shards in order."""

    version: int
    content_id: str
    num_images: int
    num_captions: int
    rows_per_group: int
    sources: dict[str, int]
    settings: dict[str, Any]
    tool_version: str
    shards: tuple[Shard, ...]
    folder: Path
    num_uncaptioned: int = 0
    """Pictures without a caption, which only tasks with annotations of their own can use."""

    def row_groups(self) -> list[RowGroup]:
        """List all row groups in manifest order; only the last of a shard may be short."""
        size = self.rows_per_group
        return [
            RowGroup(shard.name, index, min(size, shard.rows - index * size))
            for shard in self.shards
            for index in range(-(-shard.rows // size))
        ]


def content_id(rows: Iterable[tuple[str, bytes, Sequence[str], str | None]]) -> str:
    """Hash (image id, SHA-256 of the picture, captions, annotations) of all rows.

    Neither order nor sharding matters. A row without annotations counts as its first three, so
    that corpora of captions keep the ids that they had before there were annotations.
    """
    digest = hashlib.sha256()
    told = (
        (image_id, sha256.hex(), list(texts), *([] if annotations is None else [annotations]))
        for image_id, sha256, texts, annotations in rows
    )
    for row in sorted(told):
        digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def check_captioned(manifest: Manifest) -> None:
    """Refuse a corpus with pictures that have no caption, where every one needs its pair.

    Raises:
        InputError: there are such pictures.
    """
    if manifest.num_uncaptioned:
        raise InputError(
            f"{manifest.folder}: {manifest.num_uncaptioned} of {manifest.num_images} pictures have"
            " no caption, and pre-training needs one of each. Pass a corpus of captions."
        )


def write_shard(
    folder: Path, name: str, rows: Iterable[dict[str, Any]], *, rows_per_group: int
) -> Shard | None:
    """Write rows of `SCHEMA` as one shard of the corpus in `folder`; it appears whole or never.

    A shard of the same name is replaced. At most `rows_per_group` rows are in memory. Without a
    single row nothing is written: None.
    """
    target = folder / SHARD_FOLDER / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # A retried task may overlap the attempt that it replaces: each writes to a name of its own.
    partial = target.with_name(f"{name}.{os.getpid()}.tmp")
    num_rows, source = 0, iter(rows)
    with pq.ParquetWriter(partial, SCHEMA, **PARQUET_OPTIONS) as writer:
        while group := list(islice(source, rows_per_group)):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA), rows_per_group)
            num_rows += len(group)
    if not num_rows:
        partial.unlink()
        return None
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    partial.replace(target)
    return Shard(name, num_rows, target.stat().st_size, digest)


def write_manifest(manifest: Manifest) -> Path:
    """Write the manifest into its folder, by rename: with it the corpus is complete and final."""
    target = manifest.folder / MANIFEST_NAME
    body = asdict(manifest)
    del body["folder"]
    partial = target.with_name(f"{MANIFEST_NAME}.tmp")
    with partial.open("w", encoding="ascii") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    return target


def tool_version() -> str:
    """Give the version of this program, for the manifest."""
    try:
        return version("albef")
    except PackageNotFoundError:  # a working directory that Ray has copied to a cluster
        return "not installed"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a corpus and check that its shards are there.

    Raises:
        InputError: `folder` is no corpus, or a damaged or newer one.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: not a corpus (no {MANIFEST_NAME})."
            " Build one with `python jobs/ingest.py --source SRC --out DIR` and pass that DIR."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"not JSON ({error})") from None
    found = body.get("version") if isinstance(body, dict) else None
    if found != VERSION:
        raise _damaged(path, f"has version {found!r} where this program reads {VERSION}")
    try:
        shards = tuple(Shard(**shard) for shard in body.pop("shards"))
        manifest = Manifest(**body, shards=shards, folder=Path(folder))
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"has a wrong or missing field ({error})") from None
    for shard in manifest.shards:
        _check_shard(path, manifest.folder / SHARD_FOLDER / shard.name, shard)
    return manifest


def read_row_group(folder: Path, shard: str, index: int, columns: Sequence[str]) -> pa.Table:
    """Read some columns of one row group."""
    with pq.ParquetFile(Path(folder) / SHARD_FOLDER / shard) as file:
        return file.read_row_group(index, columns=list(columns))


def read_columns(manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read some columns of a whole corpus in manifest order, one shard at a time."""
    for shard in manifest.shards:
        with pq.ParquetFile(manifest.folder / SHARD_FOLDER / shard.name) as file:
            yield file.read(columns=list(columns))


def read_rows(manifest: Manifest, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield some columns of every row in manifest order."""
    for table in read_columns(manifest, columns):
        yield from zip(*(table[name].to_pylist() for name in columns), strict=True)


def read_captions(manifest: Manifest) -> Iterator[list[str]]:
    """Yield the captions of every image in manifest order."""
    for table in read_columns(manifest, ["captions"]):
        yield from table["captions"].to_pylist()


def _check_shard(manifest: Path, path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise _damaged(manifest, f"lists {shard.name}, which is not in {path.parent}")
    if (found := path.stat().st_size) != shard.bytes:
        raise _damaged(manifest, f"lists {shard.name} with {shard.bytes} bytes, it has {found}")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}. Copy the corpus again, or ingest its source once more.")
