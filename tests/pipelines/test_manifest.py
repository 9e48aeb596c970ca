import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from albef_core.errors import InputError
from pipelines.manifest import (
    Manifest,
    RowGroup,
    content_id,
    read_captions,
    read_manifest,
    read_row_group,
    write_manifest,
    write_shard,
)


def row(number: int) -> dict:
    return {
        "image": bytes([number]) * 40,
        "image_id": f"test:{number}",
        "captions": [f"caption {number}", "another"],
        "width": 3,
        "height": 2,
        "source": "test",
        "url": None,
        "sha256": bytes([number]) * 32,
        "phash": 2**64 - 1 - number,
        "split": None,
        "annotations": None,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    shards = [
        write_shard(tmp_path, "shard-00000.parquet", map(row, range(5)), rows_per_group=2),
        write_shard(tmp_path, "shard-00001.parquet", map(row, range(5, 7)), rows_per_group=2),
    ]
    manifest = Manifest(
        version=1,
        content_id="abc",
        num_images=7,
        num_captions=14,
        rows_per_group=2,
        sources={"test": 7},
        settings={"seed": 0},
        tool_version="0",
        shards=tuple(shard for shard in shards if shard),
        folder=tmp_path,
    )
    write_manifest(manifest)
    return manifest


def test_a_manifest_is_read_back_as_it_was_written(corpus):
    assert read_manifest(corpus.folder) == corpus


def test_row_groups_are_full_but_the_last_of_each_shard(corpus):
    assert corpus.row_groups() == [
        RowGroup("shard-00000.parquet", 0, 2),
        RowGroup("shard-00000.parquet", 1, 2),
        RowGroup("shard-00000.parquet", 2, 1),
        RowGroup("shard-00001.parquet", 0, 2),
    ]


def test_row_groups_on_disk_are_those_that_the_manifest_lists(corpus):
    tables = [
        read_row_group(corpus.folder, group.shard, group.index, ["image_id"])
        for group in corpus.row_groups()
    ]
    assert [table.num_rows for table in tables] == [2, 2, 1, 2]
    assert [name for table in tables for name in table["image_id"].to_pylist()] == [
        f"test:{number}" for number in range(7)
    ]


def test_a_row_survives_the_shard_unchanged(corpus):
    table = read_row_group(corpus.folder, "shard-00001.parquet", 0, list(row(0)))
    assert table.to_pylist() == [row(5), row(6)]


def test_pictures_are_stored_uncompressed_and_without_a_dictionary(corpus):
    file = pq.ParquetFile(corpus.folder / "shards" / "shard-00000.parquet")
    column = file.metadata.row_group(0).column(0)
    assert column.path_in_schema == "image"
    assert column.compression == "UNCOMPRESSED"
    assert not column.has_dictionary_page


def test_captions_come_in_manifest_order(corpus):
    assert list(read_captions(corpus)) == [[f"caption {number}", "another"] for number in range(7)]


def test_content_id_does_not_depend_on_order():
    rows = [(f"a:{number}", bytes([number]) * 32, [f"c{number}"], None) for number in range(10)]
    assert content_id(rows) == content_id(reversed(rows))


@pytest.mark.parametrize(
    "other",
    [
        ("a:2", b"\1" * 32, ["c"], None),
        ("a:1", b"\2" * 32, ["c"], None),
        ("a:1", b"\1" * 32, ["c", "d"], None),
        ("a:1", b"\1" * 32, ["c"], "{}"),
    ],
)
def test_content_id_depends_on_id_picture_captions_and_annotations(other):
    assert content_id([("a:1", b"\1" * 32, ["c"], None)]) != content_id([other])


def test_content_id_of_captions_alone_is_the_one_of_before_annotations():
    written = b'["a:1","%s",["c"]]\n' % (b"01" * 32)
    found = content_id([("a:1", b"\1" * 32, ["c"], None)])
    assert found == hashlib.sha256(written).hexdigest()


def test_content_id_keeps_captions_apart():
    one, other = ([("a", b"\1", texts, None)] for texts in (["b c"], ["b", "c"]))
    assert content_id(one) != content_id(other)


def test_a_shard_without_rows_leaves_nothing(tmp_path):
    assert write_shard(tmp_path, "shard-00000.parquet", [], rows_per_group=2) is None
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_shard_that_fails_half_way_does_not_appear(tmp_path):
    def rows():
        yield row(0)
        yield row(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path, "shard-00000.parquet", rows(), rows_per_group=1)
    assert list((tmp_path / "shards").glob("*.parquet")) == []


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a corpus.*jobs/ingest\.py"):
        read_manifest(tmp_path)


def test_a_missing_shard_is_named(corpus):
    (corpus.folder / "shards" / "shard-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.parquet, which is not in"):
        read_manifest(corpus.folder)


def test_a_truncated_shard_is_named(corpus):
    os.truncate(corpus.folder / "shards" / "shard-00000.parquet", 100)
    with pytest.raises(InputError, match=r"shard-00000\.parquet with \d+ bytes, it has 100"):
        read_manifest(corpus.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9 where this program reads 1"),
        ({"surprise": 1}, "wrong or missing field"),
        ({"shards": [{"name": "a"}]}, "wrong or missing field"),
    ],
)
def test_a_damaged_manifest_is_refused(corpus, change, message):
    path = corpus.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_manifest(corpus.folder)


def test_a_manifest_cut_short_is_refused(corpus):
    os.truncate(corpus.folder / "manifest.json", 30)
    with pytest.raises(InputError, match="not JSON"):
        read_manifest(corpus.folder)


def test_a_corpus_can_be_moved(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved") / "corpus"
    corpus.folder.rename(folder)
    assert read_manifest(folder) == dataclasses.replace(corpus, folder=folder)
