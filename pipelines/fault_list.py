"""A list of URLs of a fault server, what must become of each row, and whether a crawl says so."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.crawl_store import LEDGER_FOLDER, OK, PICTURE_FOLDER
from pipelines.fault_answers import ENCODED_ANEW, OF_HALF_SIZE, body_of
from pipelines.fault_bodies import Size, half
from pipelines.faults import FAULTS, deal, host_addresses

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("url", pa.string(), nullable=False),  # as listed; what could be read of it
        pa.field("fault", pa.string(), nullable=False),  # `picture`: none
        pa.field("state", pa.string(), nullable=False),
        pa.field("failure", pa.string()),
        pa.field("or_failure", pa.string()),  # another class that is as right
        pa.field("is_retried", pa.bool_()),  # null: that depends
        pa.field("width", pa.int32()),  # of the picture that is served, upright
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.binary(32)),  # of what is served, if it may be stored as it is
    ]
)


@dataclass(frozen=True, kw_only=True)
class FaultList:
    """A list: its rows are a pure function of this."""

    port: int
    num_rows: int
    faulty: float
    """Share of the rows that have a fault."""
    num_hosts: int = 64
    size: Size = (500, 375)
    without: tuple[str, ...] = ()
    """Faults that no row has."""
    seed: int = 0

    def rows(self) -> Iterator[tuple[str, str]]:
        """Give fault and URL of each row; of rows that are no URL, what stands in its place."""
        dice, hosts = random.Random(f"{self.seed} hosts"), host_addresses(self.num_hosts)
        plain: list[str] = []
        faults = deal(self.num_rows, faulty=self.faulty, seed=self.seed, without=self.without)
        for row, kind in enumerate(faults):
            own = FAULTS[kind].host if kind in FAULTS else ""
            url = f"http://{own or dice.choice(hosts)}:{self.port}/{kind}/{row}.jpg"
            match kind:
                case "picture":
                    plain.append(url)
                case "duplicate":
                    url = _respelled(dice.choice(plain), row)
                case "non-ascii":
                    url = url.replace(f"{row}.jpg", f"b\u00e4ume-\u6728_{row}.jpg")
                case "no-host":
                    url = f"http://host-{row % 4}.invalid/{row}.jpg"
                case "no-tls":
                    url = url.replace("http:", "https:")
                case "ftp":
                    url = url.replace("http:", "ftp:")
                case "no-url":
                    url = ""
            yield kind, url


def _respelled(url: str, row: int) -> str:
    """Write a URL in another way that means the same (RFC 3986, sections 6.2.2 and 6.2.3)."""
    head, _, name = url.rpartition("/")
    match row % 4:
        case 0:
            return f"{url}#top"
        case 1:
            return url.replace("http:", "HTTP:")
        case 2:
            return f"{head}/%3{name[0]}{name[1:]}"
    return f"{head}/./{name}"


def write_list(rows: FaultList, path: Path) -> None:
    """Write the list as CC12M's is: URL, tab, caption."""
    with path.open("wb") as file:
        for number, (kind, url) in enumerate(rows.rows()):
            caption = f"Photograph number {number} of a place, {kind}."
            line = f"{url}\t{caption}\n".encode()
            if kind == "no-tab":
                line = line.replace(b"\t", b" ")
            if kind == "no-utf8":
                line = line.replace(b"place", b"pla\xe7e")
            file.write(line)


def write_truth(rows: FaultList, path: Path) -> None:
    """Write what must become of each row, as TRUTH_SCHEMA has it."""
    told = [
        {"row": number, "url": url, "fault": kind, **_truth(kind, number, rows.size)}
        for number, (kind, url) in enumerate(rows.rows())
    ]
    pq.write_table(pa.Table.from_pylist(told, schema=TRUTH_SCHEMA), path)


def _truth(kind: str, number: int, size: Size) -> dict[str, Any]:
    fault = FAULTS.get(kind)
    said: dict[str, Any] = {"state": OK, "failure": None, "or_failure": None, "is_retried": False}
    if fault is not None:
        said = {name: getattr(fault, name) for name in said}
    if said["state"] != OK:
        return said
    width, height = half(size) if kind in OF_HALF_SIZE else size
    if kind == "rotated":
        width, height = height, width
    body = None if kind in ENCODED_ANEW else body_of(kind, number, size)
    sha256 = body and hashlib.sha256(body).digest()
    return {**said, "width": width, "height": height, "sha256": sha256}


def find_differences(crawl: Path, truth: Path, *, was_disturbed: bool = False) -> list[str]:
    """Compare the ledger and the store of a crawl that has ended with the truth, row by row.

    Says of each row that differs what it is; empty: all is as it must be. `was_disturbed`: attempts
    may be missing, because the server had healed when the crawl went on.
    """
    found = ds.dataset(crawl / LEDGER_FOLDER, format="parquet").to_table()
    found = found.drop_columns(["caption", "host"]).to_pylist()
    expected = {row["row"]: row for row in pq.read_table(truth).to_pylist()}
    times = Counter(row["row"] for row in found)
    said = [f"row {row}: {times[row]} times in the ledger" for row in expected if times[row] != 1]
    said += [f"row {row}: was never listed" for row in times.keys() - expected.keys()]
    places: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (row for row in found if row["row"] in expected):
        wanted = expected[row["row"]]
        label = f"row {row['row']}, {wanted.get('fault')}, {row['url']}"
        said += [f"{label}: {what}" for what in _row_differences(row, wanted, was_disturbed)]
        if row["state"] == OK:
            places[row["shard"], row["shard_row"]] = row
    return said + list(_store_differences(crawl, places))


def _row_differences(
    row: dict[str, Any], wanted: dict[str, Any], was_disturbed: bool
) -> Iterator[str]:
    if row["state"] != wanted["state"] or row["failure"] not in (
        wanted["failure"],
        wanted["or_failure"],
    ):
        found = f"{row['state']}, {row['failure']} ({row['detail']})"
        yield f"is {found} and not {wanted['state']}, {wanted['failure']}"
        return
    is_retried = row["attempts"] > 1  # those of a host that was given up have none
    if wanted["is_retried"] not in (None, is_retried) and not was_disturbed:
        yield f"{row['attempts']} attempts"
    if row["state"] != OK:
        return
    size = row["original_width"], row["original_height"]
    if size != (wanted["width"], wanted["height"]):
        yield f"the picture was {size[0]} x {size[1]}"
    is_whole = (row["width"], row["height"]) == size
    if is_whole and wanted["sha256"] not in (None, row["sha256"]):
        yield "the picture is not as it was served"


def _store_differences(crawl: Path, places: dict[tuple[str, int], dict[str, Any]]) -> Iterator[str]:
    """Compare the store with the ledger: each picture is named once, and is what the row says."""
    left = dict(places)
    for file in sorted((crawl / PICTURE_FOLDER).glob("*.parquet")):
        place = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(256, columns=["key", "image"]):
                for picture in batch.to_pylist():
                    row = left.pop((file.name, place), None)
                    label = f"{file.name}, picture {place}"
                    if row is None:
                        yield f"{label}: no row of the ledger names it"
                    elif row["key"] != picture["key"]:
                        yield f"{label}: is of another URL than row {row['row']}"
                    elif row["sha256"] != hashlib.sha256(picture["image"]).digest():
                        yield f"{label}: is not what row {row['row']} says"
                    place += 1
    yield from (f"row {row['row']}: its picture is not in the store" for row in left.values())
