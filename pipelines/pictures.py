"""The pictures of a corpus for a model: all of them, in order, decoded by Ray tasks."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from albef_core.preprocess import UndecodableImage, decode_image, resize_square
from pipelines.manifest import Manifest, RowGroup, read_row_group
from pipelines.pairs import open_corpus

DECODE_CPUS = 0.5
BLOCKS_IN_STORE = 6
"""Blocks that may wait or be made at once in the object store."""

Block = dict[str, NDArray[Any]]


def decoded_blocks(manifest: Manifest, *, image_size: int) -> Iterator[Block]:
    """Decode and resize a corpus in manifest order: one row group = one task = one block.

    A block has `image` (N, S, S, 3) of bytes, `image_id`, and `is_decoded`: False, and the picture
    black, where the file does not decode. No row is ever dropped.
    """
    dataset = decoded(manifest, manifest.row_groups(), image_size=image_size)
    hold_order(dataset, block_bytes=manifest.rows_per_group * 3 * image_size**2)
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy")
    return iter(blocks)


def decoded(manifest: Manifest, groups: Sequence[RowGroup], *, image_size: int) -> ray.data.Dataset:
    """Plan the blocks of `decoded_blocks` for some row groups; each says its `shard` and `index`.

    They come in the order of `groups` once `hold_order` was called on the last data set of the
    plan.
    """
    items = [{"shard": group.shard, "index": group.index} for group in groups]
    task: Any = _decode  # Ray's own type of it lists every format of a batch
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        task,
        batch_size=None,
        num_cpus=DECODE_CPUS,
        fn_kwargs={"folder": manifest.folder.absolute(), "image_size": image_size},
    )


def hold_order(dataset: ray.data.Dataset, *, block_bytes: int) -> None:
    """Let blocks arrive whole and in order, with only a few of them in the object store."""
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=BLOCKS_IN_STORE * block_bytes
    )
    context.target_max_block_size = None  # or a large block would be cut in two
    context.enable_progress_bars = False
    context.print_on_execution_start = False


@lru_cache(maxsize=64)  # what is asked about one picture follows each other
def picture_at(corpus: Path, row: int, image_size: int) -> NDArray[np.uint8] | None:
    """Decode and resize one picture of a corpus; None where it does not decode."""
    try:
        return resize_square(decode_image(open_corpus(corpus).read(row).image), image_size)
    except UndecodableImage:
        return None


def _decode(item: Block, *, folder: Path, image_size: int) -> Block:
    shard, index = str(item["shard"][0]), int(item["index"][0])
    table = read_row_group(folder, shard, index, ["image", "image_id"])
    images = np.zeros((len(table), image_size, image_size, 3), dtype=np.uint8)
    is_decoded = np.ones(len(table), dtype=bool)
    for place, encoded in enumerate(table["image"].to_pylist()):
        try:
            images[place] = resize_square(decode_image(encoded), image_size)
        except UndecodableImage:
            is_decoded[place] = False
    ids = np.array(table["image_id"].to_pylist(), dtype=object)
    place = {name: np.repeat(item[name][:1], len(table)) for name in ("shard", "index")}
    return {"image": images, "image_id": ids, "is_decoded": is_decoded, **place}
