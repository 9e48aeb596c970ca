"""A corpus as WebDataset tars, for other tools and back: one Ray task a tar."""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.data

from albef_core.errors import InputError
from pipelines.cluster import connect
from pipelines.ingest_config import PackConfig
from pipelines.manifest import SCHEMA, Manifest, read_manifest, read_row_group

PACK_NAME = "pack.json"
"""Says which corpus the tars of a folder are; written before the first of them."""
SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif"}


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What a pack has written."""

    folder: Path
    content_id: str
    """Of the corpus; the tars, ingested, make one of the same id."""
    num_tars: int
    num_images: int
    num_bytes: int
    seconds: float


def pack(config: PackConfig, *, on_progress: Callable[[int, int], None]) -> PackResult:
    """Write every shard of a corpus as a tar: 00000.tar, 00001.tar...

    Of each picture: KEY.jpg (or png, webp, gif) as stored, KEY.txt with its first caption, and
    KEY.json with all of them, image id, URL, sizes, SHA-256 and annotations. A tar appears whole or
    not at all, and those that are there already are not written again. `on_progress` is told
    tars done and their total.

    Raises:
        InputError: `corpus` is none, or `out` has tars of another.
    """
    start = time.monotonic()
    manifest = read_manifest(config.corpus.absolute())  # workers run in other folders
    _claim(config.out, manifest)
    names = {shard.name: f"{number:05d}.tar" for number, shard in enumerate(manifest.shards)}
    missing = [name for name, tar in names.items() if not (config.out / tar).exists()]
    done = len(names) - len(missing)
    for _tar in _run(manifest, [(name, names[name]) for name in missing], config.out):
        done += 1
        on_progress(done, len(names))
    for leftover in config.out.glob("*.tar.*.tmp"):  # of tasks whose worker died
        leftover.unlink()
    return PackResult(
        folder=config.out,
        content_id=manifest.content_id,
        num_tars=len(names),
        num_images=manifest.num_images,
        num_bytes=sum((config.out / tar).stat().st_size for tar in names.values()),
        seconds=round(time.monotonic() - start, 1),
    )


def _claim(out: Path, manifest: Manifest) -> None:
    """Make `out` the folder of this corpus's tars, and refuse one that has others."""
    note = out / PACK_NAME
    if note.is_file():
        found = json.loads(note.read_text())["content_id"]
        if found != manifest.content_id:
            raise InputError(
                f"--out {out}: has tars of another corpus ({found[:12]}), and this is"
                f" {manifest.content_id[:12]}. Choose another folder."
            )
        return
    if out.exists() and (not out.is_dir() or any(out.glob("*.tar"))):
        raise InputError(f"--out {out}: is a file, or has tars already. Choose a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    partial_note = note.with_name(f"{PACK_NAME}.tmp")
    partial_note.write_text(json.dumps({"content_id": manifest.content_id}))
    partial_note.replace(note)


def _run(manifest: Manifest, shards: list[tuple[str, str]], out: Path) -> Iterator[str]:
    if not shards:
        return
    connect()
    items = [{"shard": shard, "tar": tar} for shard, tar in shards]
    write = partial(_write_tar, manifest=manifest, out=out.resolve())
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(write)
    for row in dataset.iter_rows():
        yield row["tar"]


def _write_tar(item: dict[str, str], *, manifest: Manifest, out: Path) -> dict[str, str]:
    target = out / item["tar"]
    # A retried task may overlap the attempt that it replaces: each writes to a name of its own.
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    groups = [group for group in manifest.row_groups() if group.shard == item["shard"]]
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            number = 0
            for group in groups:
                table = read_row_group(manifest.folder, group.shard, group.index, SCHEMA.names)
                for row in table.to_pylist():
                    for suffix, body in _members(row):
                        info = tarfile.TarInfo(f"{target.stem}{number:06d}.{suffix}")
                        info.size = len(body)
                        tar.addfile(info, io.BytesIO(body))
                    number += 1
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(target)
    return {"tar": target.name}


def _members(row: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Give the files of one picture by their suffixes."""
    image = row["image"]
    known = (suffix for magic, suffix in SUFFIXES.items() if image.startswith(magic))
    yield next(known, "jpg"), image  # a damaged one, which its reader will name
    told = {name: row[name] for name in ("image_id", "captions", "url", "width", "height", "split")}
    told["sha256"] = row["sha256"].hex()
    told["annotations"] = None if row["annotations"] is None else json.loads(row["annotations"])
    if row["captions"]:
        told["caption"] = row["captions"][0]  # where other tools look for it
        yield "txt", row["captions"][0].encode()
    yield "json", json.dumps(told).encode()
