import pytest

from albef_core.errors import InputError
from pipelines.cleaning import write_cleaned
from pipelines.manifest import content_id, read_columns, read_manifest
from tests.conftest import picture_row, write_corpus


@pytest.fixture
def rows():
    """Nine pictures in two shards; the last has annotations alone."""
    rows = [picture_row(number) for number in range(9)]
    rows[8] |= {"captions": [], "annotations": '{"questions": []}'}
    return rows


@pytest.fixture
def source(tmp_path, rows):
    return write_corpus(tmp_path / "source", rows, rows_per_shard=5, rows_per_group=2)


def stored(manifest):
    return [row for table in read_columns(manifest, list(picture_row(0)))
            for row in table.to_pylist()]  # fmt: skip


def test_captions_go_and_so_do_pictures_without_any(source, rows, tmp_path):
    write_cleaned(source, {1: [0], 4: [0, 1], 6: [1]}, tmp_path / "out", settings={"by": "hand"})

    cleaned = read_manifest(tmp_path / "out")
    rows[1]["captions"] = rows[1]["captions"][1:]
    rows[6]["captions"] = rows[6]["captions"][:1]
    expected = [row for number, row in enumerate(rows) if number not in (4, 8)]
    assert stored(cleaned) == expected
    assert (cleaned.num_images, cleaned.num_captions, cleaned.num_uncaptioned) == (7, 12, 0)
    assert cleaned.sources == {"test": 7}
    assert cleaned.settings == {"by": "hand"}
    assert [group.rows for group in cleaned.row_groups()] == [2, 2, 2, 1]
    assert cleaned.content_id != source.content_id
    assert cleaned.content_id == content_id(
        (row["image_id"], row["sha256"], row["captions"], row["annotations"]) for row in expected
    )


def test_a_shard_that_loses_all_is_left_out(source, tmp_path):
    write_cleaned(source, {row: [0, 1] for row in range(5, 8)}, tmp_path / "out", settings={})

    assert [shard.name for shard in read_manifest(tmp_path / "out").shards] == [
        "part-00000.parquet"
    ]


def test_nothing_left_is_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"no caption of .*source would be left"):
        write_cleaned(source, {row: [0, 1] for row in range(8)}, tmp_path / "out", settings={})

    assert not (tmp_path / "out" / "manifest.json").exists()
