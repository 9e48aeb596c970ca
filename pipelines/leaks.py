"""Which held-out pictures were learned from: a model knows those, so they prove nothing."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.manifest import Manifest, read_columns

KINDS = ("image_id", "sha256", "phash")
"""Columns by which a picture is known again: its name, its bytes, and its look. Equal looks are
alike at 64 bits, and may still be two pictures."""
NUM_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """How much of a held-out corpus is in the corpus that a model learned from."""

    corpus_id: str
    """Content id of the held-out corpus."""
    num_images: int
    """Pictures of it."""
    num_leaked: int
    """Those that are known again by any of `KINDS`."""
    by_kind: dict[str, int]
    """... and by each; a picture may be known by several."""
    some_ids: tuple[str, ...]
    """The first of them."""

    @property
    def share(self) -> float:
        """Give the share of the held-out pictures that are known again."""
        return self.num_leaked / self.num_images


def find_leaks(learned: Manifest, held_out: Manifest) -> LeakReport:
    """Look for every held-out picture among those learned from, by `KINDS`; no Ray.

    Of the corpus that was learned from, one column of one shard is in memory at a time. Pictures
    that are nearly, but not wholly, alike are not found.
    """
    columns = pa.concat_tables(read_columns(held_out, KINDS))
    seen = {kind: _seen(columns[kind], learned, kind) for kind in KINDS}
    is_leaked = np.logical_or.reduce(list(seen.values()))
    return LeakReport(
        corpus_id=held_out.content_id,
        num_images=held_out.num_images,
        num_leaked=int(is_leaked.sum()),
        by_kind={kind: int(seen[kind].sum()) for kind in KINDS},
        some_ids=tuple(columns["image_id"].filter(pa.array(is_leaked))[:NUM_NAMED].to_pylist()),
    )


def _seen(wanted: pa.ChunkedArray, learned: Manifest, kind: str) -> NDArray[np.bool_]:
    """Mark the values that the corpus has; of each shard only those that were wanted are kept."""
    values = wanted.unique()
    found = [
        table[kind].filter(pa.array(_is_in(table[kind], values))).unique()
        for table in read_columns(learned, [kind])
    ]
    return _is_in(wanted, pa.concat_arrays(found))


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> NDArray[np.bool_]:
    return pc.call_function("is_in", [column], pc.SetLookupOptions(values)).to_numpy()
