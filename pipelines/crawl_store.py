"""A crawl on disk: what `crawl.json`, the ledger and the store of pictures hold, and where."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from albef_core.errors import InputError

VERSION = 1
CRAWL_NAME = "crawl.json"
LEDGER_FOLDER = "ledger"
JOURNAL_FOLDER = "journal"
PICTURE_FOLDER = "pictures"
ROWS_PER_GROUP = 32
"""Pictures in a row group of the store: ingest deals whole groups into shards of a corpus."""

OK, FAILED, REFUSED, DUPLICATE, PENDING = STATES = (
    "ok",
    "failed",
    "refused",
    "duplicate",
    "pending",
)
"""States of a row. `duplicate`: an earlier row, by list and number, has the same key; it tells what
became of the URL."""

_NAME = pa.dictionary(pa.int32(), pa.string())

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("list", _NAME, nullable=False),  # name of the list, the `source` of image ids
        pa.field("row", pa.int64(), nullable=False),  # number in the list, from 0
        pa.field("url", pa.string(), nullable=False),  # as listed
        pa.field("caption", pa.string(), nullable=False),  # as listed
        pa.field("key", pa.binary(16), nullable=False),  # BLAKE2b of the canonical URL
        pa.field("host", pa.string(), nullable=False),  # host:port where not the scheme's own
        pa.field("state", _NAME, nullable=False),
        pa.field("failure", _NAME),  # class of what went wrong, of failed and refused
        pa.field("detail", pa.string()),  # what was found, for a reader
        pa.field("attempts", pa.int16(), nullable=False),
        pa.field("first_at", pa.timestamp("ms", tz="UTC")),
        pa.field("last_at", pa.timestamp("ms", tz="UTC")),
        pa.field("http_status", pa.int16()),
        pa.field("num_bytes", pa.int64()),  # of the body that came
        pa.field("original_width", pa.int32()),  # after orientation, before resizing
        pa.field("original_height", pa.int32()),
        pa.field("width", pa.int32()),  # as stored
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.binary(32)),  # of the stored picture
        pa.field("phash", pa.uint64()),  # of the stored picture
        pa.field("shard", _NAME),  # file in `pictures`
        pa.field("shard_row", pa.int32()),
    ]
)
"""One row for every row of every list. `sha256` and what follows are of rows that are `ok`."""

PICTURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # encoded, as stored
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A list whose rows are in the ledger, all of them."""

    name: str
    """Source of its pictures, as in `cc3m`."""
    files: tuple[str, ...]
    """Where it was read from."""
    num_bytes: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """What a crawl is: how many partitions it has, the lists that it knows, and its settings."""

    version: int
    num_partitions: int
    """A host, and with it each of its URLs, is of one partition, by hash; fixed at the start."""
    lists: tuple[Listed, ...]
    settings: dict[str, Any]
    """What pictures were stored with: changing it would mix two kinds in one store."""
    tool_version: str
    folder: Path

    def ledger(self, partition: int) -> Path:
        """Name the file that has every row of a partition, but for what the journal says."""
        return self.folder / LEDGER_FOLDER / f"part-{partition:04d}.parquet"

    def journal(self, partition: int) -> Path:
        """Name the folder of rows that ended since the partition's ledger was written."""
        return self.folder / JOURNAL_FOLDER / f"part-{partition:04d}"

    def pictures(self, shard: str) -> Path:
        """Name the file of a ledger row's `shard`."""
        return self.folder / PICTURE_FOLDER / shard


def write_crawl(crawl: Crawl) -> None:
    """Write `crawl.json`, by rename."""
    body = asdict(crawl)
    del body["folder"]
    target = crawl.folder / CRAWL_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{CRAWL_NAME}.tmp")
    with partial.open("w", encoding="ascii") as file:
        json.dump(body, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def is_crawl(source: str) -> bool:
    """Say whether `--source` of ingest is a crawl's folder."""
    return (Path(source) / CRAWL_NAME).is_file()


def read_crawl(folder: Path) -> Crawl:
    """Read what a crawl is.

    Raises:
        InputError: `folder` is none, or a damaged or newer one.
    """
    path = Path(folder) / CRAWL_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] != VERSION:
            found = f"version {body['version']!r} where this program reads {VERSION}"
            raise InputError(f"{path}: has {found}. Take the program that made it.")
        body["lists"] = tuple(
            Listed(**{**one, "files": tuple(one["files"])}) for one in body["lists"]
        )
        return Crawl(**body, folder=Path(folder))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: not a crawl (no {CRAWL_NAME})."
            " Make one with `python jobs/crawl.py --source LIST --out DIR` and pass that DIR."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}). Take it from a copy.") from None
