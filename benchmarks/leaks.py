"""How well copies are known again: held-out photographs, copied and changed, among others.

`python -m benchmarks.leaks --train flickr8k/train.json --held-out flickr8k/val.json`. Prints, over
radii of the perceptual hash, the share of copies that are found, and the false alarms: by the hash
alone, and with the look (`pipelines/looks.py`) that ingest asks for as well. Then near duplicates
among the training photographs, and the time and memory of grouping random hashes.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from albef_core.preprocess import decode_image
from pipelines.ingest_config import CleaningConfig, IngestConfig
from pipelines.looks import Looks, likeness, look
from pipelines.near_duplicates import near_groups, near_pairs
from pipelines.perceptual_hash import perceptual_hash
from pipelines.sources import list_records

RADII = (0, 2, 4, 6, 8, 10, 12)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    train: Path
    """List of photographs, as jobs/ingest.py takes it."""
    held_out: Path
    """List of others, which are copied and looked for."""
    hashes: int = 1_000_000
    """Random hashes to group."""


Pixels = NDArray[np.uint8]
Prints = tuple[NDArray[np.uint64], Looks]
"""Hash and look of some pictures."""


def copies(pixels: Pixels, rng: np.random.Generator) -> Iterator[tuple[str, Pixels]]:
    """Change a photograph as sites do."""
    yield "byte-identical", pixels
    for quality in (95, 75, 50):
        yield f"JPEG {quality}", _encoded(pixels, quality)
    for scale in (0.5, 2.0):
        yield f"{scale:g} x, JPEG 75", _encoded(_scaled(pixels, scale), 75)
    scale, quality = float(2 ** rng.uniform(-1, 1)), int(rng.integers(50, 96))
    yield "0.5 to 2 x, JPEG 50 to 95", _encoded(_scaled(pixels, scale), quality)
    height, width = pixels.shape[:2]
    top, left = round(0.01 * height), round(0.01 * width)
    yield "crop of 2 % a side's length", pixels[top : height - top, left : width - left].copy()
    top, left = round(0.02 * height), round(0.02 * width)
    yield "crop of 2 % at every edge", pixels[top : height - top, left : width - left].copy()


def _scaled(pixels: Pixels, scale: float) -> Pixels:
    height, width = (round(side * scale) for side in pixels.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=how), dtype=np.uint8)


def _encoded(pixels: Pixels, quality: int) -> Pixels:
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    _ok, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return decode_image(jpeg.tobytes())


def photographs(source: Path) -> list[Pixels]:
    """Read all pictures of a list."""
    config = IngestConfig(source=str(source), out=Path("nowhere"))
    return [decode_image(record.load().image) for record in list_records(config).records]


def prints(pictures: list[Pixels]) -> Prints:
    """Take hash and look of pictures."""
    hashes = np.array([perceptual_hash(pixels) for pixels in pictures], dtype=np.uint64)
    return hashes, np.array([look(pixels) for pixels in pictures])


def alarms(wanted: Prints, known: Prints, radius: int, least: float) -> tuple[float, float]:
    """Give the share of `wanted` pictures near one of `known`: by hash, and by look as well."""
    own, other = near_pairs(wanted[0], known[0], radius)
    is_alike = likeness(wanted[1][own], known[1][other]) >= least
    num_wanted = len(wanted[0])
    return len(np.unique(own)) / num_wanted, len(np.unique(own[is_alike])) / num_wanted


def leaks_table(train: Prints, held_out: Prints, changed: dict[str, Prints]) -> Table:
    """Lay out how many copies, and how many other photographs, each radius finds."""
    least = CleaningConfig().min_likeness
    table = Table(title=f"Found in %: by the hash / with a look of {least} at least")
    table.add_column("copy")
    for radius in RADII:
        table.add_column(f"{radius} bits", justify="right")
    for name, found in {**changed, "false alarms on train": train}.items():
        shares = [alarms(found, held_out, radius, least) for radius in RADII]
        table.add_row(name, *(f"{100 * a:.4g} / {100 * b:.4g}" for a, b in shares))
    return table


def near_table(train: Prints) -> Table:
    """Lay out the pairs of training photographs that each radius takes for one."""
    least = CleaningConfig().min_likeness
    table = Table(
        "radius", "pairs by hash", "pairs with the look", title="Near duplicates in train"
    )
    for radius in RADII:
        own, other = near_pairs(train[0], train[0], radius)
        own, other = own[own < other], other[own < other]
        is_alike = likeness(train[1][own], train[1][other]) >= least
        table.add_row(str(radius), str(len(own)), str(int(is_alike.sum())))
    return table


def speed_line(num_hashes: int, radius: int) -> str:
    """Group random hashes of which a tenth are copies, and a tenth blank; say what it took."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, num_hashes, dtype=np.uint64)
    tenth = num_hashes // 10
    flips = (np.uint64(1) << rng.integers(0, 64, (radius, tenth), dtype=np.uint64)).T
    hashes[-tenth:] = hashes[:tenth] ^ np.bitwise_xor.reduce(flips, axis=1)
    hashes[tenth : 2 * tenth] = 2**63
    start = time.monotonic()
    groups = near_groups(hashes, radius)
    seconds = time.monotonic() - start
    found = (groups[-tenth:] == np.arange(tenth)).mean()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{num_hashes:,} hashes at {radius} bits: {seconds:.1f} s, {found:.2%} of copies found,"
        f" peak of the process {peak:,.0f} MB"
    )


def main(options: Options) -> None:
    """Measure, and print the tables."""
    console = Console(width=120)
    console.print(speed_line(options.hashes, CleaningConfig().near_radius))
    train = prints(photographs(options.train))
    held_out = photographs(options.held_out)
    rng, changed = np.random.default_rng(0), dict[str, list[Pixels]]()
    for pixels in held_out:
        for name, copy in copies(pixels, rng):
            changed.setdefault(name, []).append(copy)
    found = {name: prints(pictures) for name, pictures in changed.items()}
    console.print(leaks_table(train, prints(held_out), found), near_table(train))


if __name__ == "__main__":
    main(tyro.cli(Options))
