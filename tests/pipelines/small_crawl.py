"""Small crawls on disk, as jobs/crawl.py leaves them, from rows and pictures that a test names."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from albef_core.preprocess import decode_image
from pipelines.crawl_listing import add_lists
from pipelines.crawl_store import (
    LEDGER_SCHEMA,
    OK,
    PICTURE_SCHEMA,
    ROWS_PER_GROUP,
    VERSION,
    Crawl,
    Listed,
    write_crawl,
)
from pipelines.perceptual_hash import perceptual_hash
from pipelines.url_lists import find_list


def listed_crawl(folder: Path, source: Path) -> Crawl:
    """Make a crawl of one partition that has one list, and has fetched nothing."""
    crawl = Crawl(
        version=VERSION,
        num_partitions=1,
        lists=(),
        settings={},
        tool_version="test",
        folder=folder,
    )
    return add_lists(crawl, [find_list(str(source))], on_progress=lambda rows: None)


def key_of(url: str) -> bytes:
    return hashlib.blake2b(url.encode(), digest_size=16).digest()


def photo(seed: int, *, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Pixels unlike those of other seeds, smooth as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def listed(number: int, **changes: Any) -> dict[str, Any]:
    """A row whose picture came, 640 x 480 before it was resized; `changes` are ledger columns.

    `image` is the picture, None for a row that has none.
    """
    row = {
        "list": "cats",
        "row": number,
        "url": f"http://host{number % 3}.example/{number}.jpg",
        "caption": f"a picture with number {number}",
        "state": OK,
        "image": jpeg(photo(number)) if changes.get("state", OK) == OK else None,
    }
    return row | changes


def write_small_crawl(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    lists: Sequence[str] = ("cats",),
    num_partitions: int = 2,
) -> Crawl:
    """Write a crawl that has ended."""
    crawl = Crawl(
        version=VERSION,
        num_partitions=num_partitions,
        lists=tuple(
            Listed(name=name, files=(f"{name}.tsv",), num_bytes=1, num_rows=len(rows))
            for name in lists
        ),
        settings={},
        tool_version="test",
        folder=folder,
    )
    for partition in range(num_partitions):
        write_partition(crawl, partition, [r for r in rows if _partition(r, crawl) == partition])
    write_crawl(crawl)
    return crawl


def _partition(row: dict[str, Any], crawl: Crawl) -> int:
    return sum(_host(row).encode()) % crawl.num_partitions


def _host(row: dict[str, Any]) -> str:
    return row["url"].split("/")[2] if "//" in row["url"] else ""


def write_partition(crawl: Crawl, partition: int, rows: Sequence[dict[str, Any]]) -> None:
    shard, ledger, pictures = f"part-{partition:04d}-000000.parquet", [], []
    for row in rows:
        entry = {"key": key_of(row["url"]), "host": _host(row), "attempts": 1, **row}
        image = entry.pop("image")
        if image is not None:
            stored = _stored(image) | {"key": entry["key"]}
            entry = {"original_width": 640, "original_height": 480, **entry, **stored}
            entry |= {"shard": shard, "shard_row": len(pictures)}
            pictures.append(stored | {"image": image})
        ledger.append(entry)
    _write(crawl.ledger(partition), ledger, LEDGER_SCHEMA)
    if pictures:
        _write(crawl.pictures(shard), pictures, PICTURE_SCHEMA)


def _stored(image: bytes) -> dict[str, Any]:
    pixels = decode_image(image)
    return {
        "sha256": hashlib.sha256(image).digest(),
        "phash": perceptual_hash(pixels),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
    }


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)
