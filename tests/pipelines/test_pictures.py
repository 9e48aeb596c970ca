import numpy as np
import pytest

from albef_core.preprocess import decode_image, resize_square
from pipelines.manifest import read_columns, read_manifest
from pipelines.pictures import decoded_blocks
from tests.conftest import picture_row, write_corpus

pytestmark = pytest.mark.cluster


def test_all_pictures_arrive_in_order_and_the_broken_one_is_black(local_ray, tmp_path):
    rows = [picture_row(number) for number in range(11)]
    rows[6]["image"] = b"no picture"
    manifest = write_corpus(tmp_path, rows, rows_per_shard=6, rows_per_group=4)
    blocks = list(decoded_blocks(read_manifest(tmp_path), image_size=20))
    assert [len(block["image"]) for block in blocks] == [4, 2, 4, 1]
    whole = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    assert whole["image_id"].tolist() == [row["image_id"] for row in rows]
    assert np.flatnonzero(~whole["is_decoded"]).tolist() == [6]
    stored = [row for table in read_columns(manifest, ["image"]) for row in table.to_pylist()]
    for number, (picture, row) in enumerate(zip(whole["image"], stored, strict=True)):
        expected = 0 if number == 6 else resize_square(decode_image(row["image"]), 20)
        np.testing.assert_array_equal(picture, np.broadcast_to(expected, picture.shape))
