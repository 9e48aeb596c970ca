"""The rows of a crawl as ingest chooses among them: columns of numbers and text, no pictures."""

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from albef_core.errors import InputError
from pipelines.crawl_store import DUPLICATE, FAILED, OK, REFUSED, Crawl
from pipelines.records import clean_unicode

NUM_HOSTS = 20
KEY_BYTES = 16
TEXTS_AT_ONCE = 4096
PICTURE_COLUMNS = ("row", "url", "key", "sha256", "phash", "shard_row", "width", "height")
COLUMNS = [
    *PICTURE_COLUMNS,
    "list",
    "caption",
    "state",
    "failure",
    "host",
    "shard",
    "original_width",
    "original_height",
]
# A letter of a script that is written without spaces counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = rf"[{_UNSPACED}]|[^\s\pZ{_UNSPACED}]+"


@dataclass(kw_only=True)
class CrawlCounts:
    """What became of all rows of a crawl."""

    states: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Rows that failed or were refused, by class."""
    hosts: dict[str, int] = field(default_factory=dict)
    """Those hosts that have most of them."""


@dataclass(frozen=True, kw_only=True)
class CrawlRows:
    """Pictures of a crawl in list order, and what is said of them."""

    pictures: pa.Table
    """`PICTURE_COLUMNS`; `list` and `file`, places among `crawl.lists` and `files`; the smaller and
    larger `side` of the original."""
    captions: pa.Table
    """One row a listed pair, in list order: `picture` (its row), `caption` (NFC), `hash` of it,
    `words`."""
    files: list[str]
    """Names of the crawl's files of pictures."""
    lists: list[str]
    """Names of the crawl's lists."""
    counts: CrawlCounts

    def image_ids(self, places: NDArray[np.int64]) -> pa.LargeStringArray:
        """Name pictures: the list, and the key of the URL in hexadecimal."""
        table = self.pictures.select(["list", "key"]).take(pa.array(places))
        digits = b"".join(table["key"].to_pylist()).hex().encode()
        ends = np.arange(len(places) + 1, dtype=np.int64) * 2 * KEY_BYTES
        keys = pa.LargeStringArray.from_buffers(
            len(places), pa.py_buffer(ends), pa.py_buffer(digits)
        )
        names = pa.array(self.lists, pa.large_string()).take(table["list"].combine_chunks())
        colon = pa.scalar(":", pa.large_string())
        return pc.call_function("binary_join_element_wise", [names, keys, colon])


def read_rows(crawl: Crawl) -> CrawlRows:
    """Read the rows that have a picture, a partition at a time.

    A row of state `duplicate` adds its caption to the picture of the row that has its key; both
    are of one partition, as they are of one host.

    Raises:
        InputError: a partition's ledger is missing, or the crawl has not ended.
    """
    list_numbers = {one.name: number for number, one in enumerate(crawl.lists)}
    counts, files = CrawlCounts(), dict[str, int]()
    pictures, captions, num_pictures = [], [], 0
    for partition in range(crawl.num_partitions):
        table = _read_ledger(crawl, partition)
        _count(table, counts)
        lists = pa.array([list_numbers[name] for name in _names(table["list"])], pa.int32())
        table = table.append_column("list_number", lists.take(_codes(table["list"])))
        stored = table.filter(pc.field("state") == OK)
        pictures.append(_pictures(stored, files))
        captions.append(_captions(table, stored["key"], num_pictures))
        num_pictures += stored.num_rows
    ordered = _in_list_order(pa.concat_tables(pictures), pa.concat_tables(captions))
    return CrawlRows(
        pictures=ordered[0],
        captions=ordered[1],
        files=list(files),
        lists=list(list_numbers),
        counts=counts,
    )


def count_words(captions: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
    """Count the words of texts as a reader would, also where a script has no spaces."""
    options = pc.MatchSubstringOptions(pattern=WORD)
    found = pc.call_function("count_substring_regex", [captions], options)
    return found.to_numpy().astype(np.int32)


def _in_nfc(captions: pa.ChunkedArray) -> tuple[pa.ChunkedArray, NDArray[np.uint64]]:
    """Normalize texts, and hash them to 64 bits: of 12 million, two agree once in 250,000 times.

    Arrow's own `utf8_normalize` decomposes where it should compose (pyarrow 25.0.1).
    """
    chunks, digests = [], []
    for chunk in captions.chunks:
        for start in range(0, len(chunk), TEXTS_AT_ONCE):
            texts = [clean_unicode(text) for text in chunk.slice(start, TEXTS_AT_ONCE).to_pylist()]
            chunks.append(pa.array(texts, captions.type))
            digests += [blake2b(text.encode(), digest_size=8).digest() for text in texts]
    hashes = np.frombuffer(b"".join(digests), dtype=np.uint64)
    return pa.chunked_array(chunks, captions.type), hashes


def _read_ledger(crawl: Crawl, partition: int) -> pa.Table:
    if any(crawl.journal(partition).glob("*.parquet")):
        raise InputError(
            f"{crawl.folder}: is being crawled, or its crawl was killed: {crawl.journal(partition)}"
            " holds rows that are not in the ledger yet. Let it end, or start"
            f" `python jobs/crawl.py --out {crawl.folder}` again and stop it with Ctrl-C."
        )
    path = crawl.ledger(partition)
    try:
        table = pq.read_table(path, columns=COLUMNS)
    except FileNotFoundError:
        raise InputError(f"{path}: is not there. Take it from a copy, or crawl again.") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: damaged ({error}). Take it from a copy.") from None
    # Of a whole crawl, 32-bit offsets of text would overflow.
    for name in ("url", "caption"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.large_string()))
    return table


def _names(column: pa.ChunkedArray) -> list[str]:
    return column.unify_dictionaries().chunk(0).dictionary.to_pylist() if column.num_chunks else []


def _codes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    unified = column.unify_dictionaries()
    return pa.chunked_array([chunk.indices for chunk in unified.chunks], pa.int32())


def _count(table: pa.Table, counts: CrawlCounts) -> None:
    counts.states.update(_value_counts(table["state"]))
    lost = table.filter(pc.field("state").isin([FAILED, REFUSED]))
    counts.failures.update(_value_counts(lost["failure"]))
    # A host is of one partition, so that no count is ever added to.
    hosts = [*counts.hosts.items(), *_value_counts(lost["host"]).items()]
    counts.hosts = dict(sorted(hosts, key=lambda host: (-host[1], host[0]))[:NUM_HOSTS])


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    if not len(column):
        return {}
    found = column.cast(pa.string()).combine_chunks().value_counts()
    return dict(zip(*(part.to_pylist() for part in found.flatten()), strict=True))


def _pictures(stored: pa.Table, files: dict[str, int]) -> pa.Table:
    numbers = [files.setdefault(name, len(files)) for name in _names(stored["shard"])]
    sides = [
        pc.call_function("coalesce", [stored[f"original_{side}"], stored[side]]).to_numpy()
        for side in ("width", "height")
    ]
    table = stored.select([*PICTURE_COLUMNS]).append_column("list", stored["list_number"])
    table = table.append_column("file", pa.array(numbers, pa.int32()).take(_codes(stored["shard"])))
    table = table.append_column("smaller_side", pa.array(np.minimum(*sides)))
    return table.append_column("larger_side", pa.array(np.maximum(*sides)))


def _captions(table: pa.Table, keys: pa.ChunkedArray, first: int) -> pa.Table:
    """Take the captions of all rows whose key has a picture; these count from `first` on."""
    said = table.filter(pc.field("state").isin([OK, DUPLICATE]))
    place = pc.call_function("index_in", [said["key"]], pc.SetLookupOptions(keys.combine_chunks()))
    said = said.append_column("picture", place).filter(pc.field("picture").is_valid())
    captions, hashes = _in_nfc(said["caption"])
    return pa.table(
        {
            "picture": said["picture"].to_numpy().astype(np.int64) + first,
            "list": said["list_number"],
            "row": said["row"],
            "caption": captions,
            "hash": pa.array(hashes, pa.uint64()),
            "words": count_words(captions),
        }
    )


def _in_list_order(pictures: pa.Table, captions: pa.Table) -> tuple[pa.Table, pa.Table]:
    by_list = [("list", "ascending"), ("row", "ascending")]
    order = np.lexsort((pictures["row"].to_numpy(), pictures["list"].to_numpy()))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    captions = captions.sort_by(by_list)
    moved = pa.array(place[captions["picture"].to_numpy()])
    captions = captions.select(["caption", "hash", "words"]).append_column("picture", moved)
    return pictures.take(pa.array(order)), captions
