"""Whether two pictures are one: a small gray copy of each, read by Ray tasks, and how it agrees."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import ray.data
from numpy.typing import NDArray

from albef_core.preprocess import UndecodableImage, decode_image
from pipelines.cluster import connect
from pipelines.picture_files import UNREADABLE_FILE, read_images

LOOK_PX = 16
# Gray levels; less of contrast is compression's noise on a picture of one color.
LEAST_CONTRAST = 1.0

Looks = NDArray[np.int8]
"""One row of LOOK_PX^2 a picture; zeros, which are like nothing, where it cannot be decoded."""


def look(pixels: NDArray[np.uint8]) -> Looks:
    """Reduce an RGB picture to 16 x 16 gray without brightness and contrast.

    All pictures of one color look the same.
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (LOOK_PX, LOOK_PX), interpolation=cv2.INTER_AREA)
    centered = small.ravel() - small.mean(dtype=np.float64)
    peak = np.abs(centered).max()
    if peak < LEAST_CONTRAST:
        return np.ones(LOOK_PX**2, dtype=np.int8)
    return np.round(127 / peak * centered).astype(np.int8)


def likeness(looks: Looks, others: Looks) -> NDArray[np.float32]:
    """Correlate row by row, from -1 to 1: 1 for the same picture, whatever its size or exposure."""
    a, b = looks.astype(np.float32), others.astype(np.float32)
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(sizes, 1)


def first_alike(
    hashes: NDArray[np.uint64], looks: Looks, *, radius: int, min_likeness: float
) -> NDArray[np.int64]:
    """Give for each of some pictures the first that it is a copy of, or its own place.

    A picture is a copy of an earlier one that is none itself, at most `radius` bits of the hash
    away and `min_likeness` alike. So everything that goes is a copy of what stays, and a chain of
    pictures, each a little unlike the one before, is not one picture.
    """
    first = np.full(len(hashes), -1)
    for place in range(len(hashes)):
        if first[place] >= 0:
            continue
        first[place] = place
        rest = np.flatnonzero(first < 0)
        rest = rest[np.bitwise_count(hashes[rest] ^ hashes[place]) <= radius]
        first[rest[likeness(looks[rest], looks[place]) >= min_likeness]] = place
    return first


def read_looks(files: Sequence[Path], file_of: NDArray[np.int64], rows: NDArray[np.int64]) -> Looks:
    """Look at pictures of Parquet files, one Ray task a file.

    `rows[i]` is the row of the i-th picture in `files[file_of[i]]`. Of a file only the row groups
    that hold such pictures are read, one at a time.
    """
    looks = np.zeros((len(rows), LOOK_PX**2), dtype=np.int8)
    if not len(rows):
        return looks
    connect()
    order = np.lexsort((rows, file_of))
    starts = np.flatnonzero(np.diff(file_of[order], prepend=-1))
    items = [
        {"file": str(files[int(file_of[part[0]])].absolute()), "places": part, "rows": rows[part]}
        for part in np.split(order, starts[1:])
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(_look_at)
    for row in dataset.iter_rows():
        looks[row["places"]] = row["looks"]
    return looks


def _look_at(item: dict) -> dict:
    rows = np.asarray(item["rows"])
    looks = np.zeros((len(rows), LOOK_PX**2), dtype=np.int8)
    # Whoever copies the pictures counts and names what is damaged.
    with contextlib.suppress(*UNREADABLE_FILE):
        for place, image in read_images(Path(item["file"]), rows):
            looks[place] = _look_of(image)
    return {"places": item["places"], "looks": looks}


def _look_of(image: bytes) -> Looks:
    try:
        return look(decode_image(image))
    except UndecodableImage:
        return np.zeros(LOOK_PX**2, dtype=np.int8)
