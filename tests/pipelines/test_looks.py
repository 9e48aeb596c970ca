import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.looks import first_alike, likeness, look, read_looks
from tests.pipelines.small_crawl import jpeg, photo


def test_a_picture_looks_the_same_smaller_brighter_and_with_less_contrast():
    pixels = photo(1, size=(200, 150))
    changed = (photo(1, size=(80, 60)) * 0.6 + 50).astype(np.uint8)

    assert likeness(look(pixels), look(changed)) > 0.99


def test_other_pictures_look_otherwise():
    looks = np.array([look(photo(number)) for number in range(20)])

    alike = [likeness(looks[i], looks[j]) for i in range(20) for j in range(i)]

    assert max(alike) < 0.8


def test_pictures_of_one_color_look_the_same_and_unlike_any_other():
    white, gray = (np.full((30, 40, 3), level, np.uint8) for level in (255, 90))

    assert likeness(look(white), look(gray)) == pytest.approx(1)
    assert likeness(look(white), look(photo(1))) < 0.5


def test_what_cannot_be_decoded_is_like_nothing():
    unknown = np.zeros(256, dtype=np.int8)

    assert likeness(unknown, unknown) == 0


def test_of_copies_the_first_stays_and_a_chain_is_not_one_picture():
    hashes = np.array([0b0, 0b11, 0b1111, 0b111111, 0b0], dtype=np.uint64)
    same = np.tile(look(photo(1)), (5, 1))
    same[4] = look(photo(2))

    first = first_alike(hashes, same, radius=2, min_likeness=0.9)

    assert first.tolist() == [0, 0, 2, 2, 4]


@pytest.mark.cluster
def test_looks_come_in_the_order_asked_for_and_lost_files_cost_their_own(tmp_path, local_ray):
    pictures = [jpeg(photo(number)) for number in range(7)]
    for name, part in (("a", pictures[:5]), ("b", [*pictures[5:], b"no picture"])):
        table = pa.table({"image": part})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    files = [tmp_path / name for name in ("a.parquet", "b.parquet", "absent.parquet")]
    file_of, rows = np.array([1, 0, 2, 0, 1, 0]), np.array([1, 4, 0, 0, 2, 3])

    looks = read_looks(files, file_of, rows)

    expected = [look(photo(number)) for number in (6, 4, 0, 3)]
    np.testing.assert_allclose(likeness(looks[[0, 1, 3, 5]], np.array(expected)), 1, atol=0.01)
    assert not looks[[2, 4]].any()
