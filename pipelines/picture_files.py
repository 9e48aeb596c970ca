"""Pictures of a Parquet file by their rows: a crawl's store, or a shard of a corpus."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

UNREADABLE_FILE = (OSError, pa.ArrowInvalid, IndexError)
"""What `read_images` raises of a file that is absent, damaged or too short."""


def read_images(file: Path, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """Yield (i, encoded picture of row `rows[i]`) for all i, in the order of the file.

    Only the row groups that hold such rows are read, one at a time.

    Raises:
        OSError, pa.ArrowInvalid, IndexError: as in `UNREADABLE_FILE`.
    """
    with pq.ParquetFile(file) as source:
        sizes = [source.metadata.row_group(i).num_rows for i in range(source.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        groups = np.searchsorted(starts, rows, side="right") - 1
        for group in np.unique(groups):
            if group == len(sizes):
                raise IndexError(f"has {starts[-1]} rows, and row {rows.max()} is asked for")
            places = np.flatnonzero(groups == group)
            column = source.read_row_group(int(group), columns=["image"])["image"]
            images = column.take(pa.array(rows[places] - starts[group])).to_pylist()
            yield from zip(places.tolist(), images, strict=True)
