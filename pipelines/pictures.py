"""The pictures of a corpus for evaluation: all of them, in order, decoded by Ray tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from albef_core.preprocess import UndecodableImage, decode_image, resize_square
from pipelines.manifest import Manifest, read_row_group

DECODE_CPUS = 0.5
BLOCKS_IN_STORE = 6
"""Blocks that may wait or be made at once in the object store."""

Block = dict[str, NDArray[Any]]


def decoded_blocks(manifest: Manifest, *, image_size: int) -> Iterator[Block]:
    """Decode and resize a corpus in manifest order: one row group = one task = one block.

    A block has `image` (N, S, S, 3) of bytes, `image_id`, and `is_decoded`: False, and the picture
    black, where the file does not decode. No row is ever dropped.
    """
    items = [{"shard": group.shard, "index": group.index} for group in manifest.row_groups()]
    task: Any = _decode  # Ray's own type of it lists every format of a batch
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        task,
        batch_size=None,
        num_cpus=DECODE_CPUS,
        fn_kwargs={"folder": manifest.folder.absolute(), "image_size": image_size},
    )
    context = dataset.context
    context.execution_options.preserve_order = True
    block_bytes = manifest.rows_per_group * 3 * image_size**2
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=BLOCKS_IN_STORE * block_bytes
    )
    context.target_max_block_size = None  # or a large block would be cut in two
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy")
    return iter(blocks)


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
    return {"image": images, "image_id": ids, "is_decoded": is_decoded}
