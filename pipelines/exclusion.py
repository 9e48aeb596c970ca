"""Which pictures of a crawl are in a corpus to evaluate on: by name, by bytes, and by look."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.looks import Looks, likeness, read_looks
from pipelines.manifest import SHARD_FOLDER, Manifest, read_columns
from pipelines.near_duplicates import near_pairs

Places = NDArray[np.int64]
KEY = r"^.*:(?P<key>[0-9a-f]{32})$"


@dataclass(frozen=True)
class Leak:
    """Pictures that an excluded corpus has, each with the image id that it has there."""

    places: Places
    pairs: pa.Array


def find_leaked(
    corpus: Manifest,
    *,
    image_ids: pa.Array,
    urls: pa.ChunkedArray,
    sha256: pa.ChunkedArray,
    hashes: NDArray[np.uint64],
    looks_of: Callable[[Places], Looks],
    radius: int,
    min_likeness: float,
) -> dict[str, Leak]:
    """Find pictures that are in `corpus`, by the first that tells: id, URL, bytes, look.

    A URL is known again as it was listed, or by the key of its canonical form, which ends the image
    ids of corpora that were made from crawls. By look: hashes at most `radius` bits apart (-1: not
    compared) and pictures `min_likeness` alike; `looks_of` gives the looks of some of ours.
    """
    table = pa.concat_tables(read_columns(corpus, ["image_id", "url", "sha256", "phash"]))
    ids = table["image_id"].cast(pa.large_string()).combine_chunks()
    known = {
        "image id": _where(image_ids, ids),
        "key of its URL": _where(_keys(image_ids), _keys(ids)),
        "URL": _where(urls, table["url"].cast(pa.large_string()).combine_chunks()),
        "SHA-256": _where(sha256, table["sha256"].combine_chunks()),
    }
    is_in = np.ones(len(hashes), dtype=bool)
    leaks = {}
    for kind, other in known.items():
        places = np.flatnonzero(is_in & (other >= 0))
        leaks[kind] = Leak(places, ids.take(pa.array(other[places])))
        is_in[places] = False
    if radius >= 0:
        left = np.flatnonzero(is_in)
        own, other = near_pairs(hashes[left], table["phash"].to_numpy(), radius)
        own = left[own]
        is_alike = _likeness(own, other, looks_of, corpus) >= min_likeness
        places, first = np.unique(own[is_alike], return_index=True)
        leaks["look"] = Leak(places, ids.take(pa.array(other[is_alike][first])))
    return leaks


def _where(wanted: pa.Array | pa.ChunkedArray, values: pa.Array) -> Places:
    """Give the place of each wanted value among `values`; -1: it is absent, or null."""
    options = pc.SetLookupOptions(values, skip_nulls=True)
    found = pc.call_function("index_in", [wanted], options).fill_null(-1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


def _keys(image_ids: pa.Array) -> pa.Array:
    found = pc.call_function("extract_regex", [image_ids], pc.ExtractRegexOptions(KEY))
    return found.field("key")


def _likeness(
    own: Places, other: Places, looks_of: Callable[[Places], Looks], corpus: Manifest
) -> NDArray[np.float32]:
    """Compare pictures of ours with pictures of the corpus, each read once."""
    own_rows, own_place = np.unique(own, return_inverse=True)
    other_rows, other_place = np.unique(other, return_inverse=True)
    starts = np.cumsum([0, *(shard.rows for shard in corpus.shards)])
    shard = np.searchsorted(starts, other_rows, side="right") - 1
    files = [corpus.folder / SHARD_FOLDER / one.name for one in corpus.shards]
    theirs = read_looks(files, shard, other_rows - starts[shard])
    return likeness(looks_of(own_rows)[own_place], theirs[other_place])
