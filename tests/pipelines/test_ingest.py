import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from albef_core.errors import InputError
from albef_core.preprocess import decode_image
from pipelines import ingest_units
from pipelines.ingest import ingest
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import Unit, commit_unit
from pipelines.manifest import SCHEMA, read_captions, read_columns, read_manifest
from pipelines.perceptual_hash import perceptual_hash
from pipelines.shapes import shapes_picture
from pipelines.sources import list_records
from tests.pipelines.ingest_sources import (
    commit,
    config_of,
    encoded,
    picture,
    write_list,
    write_tar,
)


def commit_one(tmp_path: Path, data: bytes, captions: str | list[str] = "a cat"):
    (tmp_path / "one.img").write_bytes(data)
    source = write_list(tmp_path, [{"image": "one.img", "caption": captions}])
    return commit(source, tmp_path / "out")


# What one picture or caption becomes.


def test_a_picture_is_stored_byte_for_byte(tmp_path):
    data = encoded(picture())
    rows, bad = commit_one(tmp_path, data)
    assert rows[0]["image"] == data
    assert (rows[0]["width"], rows[0]["height"]) == (40, 30)
    assert bad == []


def test_a_truncated_jpeg_is_counted_and_left_out(tmp_path):
    data = encoded(picture(size=(200, 150)))
    rows, bad = commit_one(tmp_path, data[: len(data) * 2 // 3])
    assert rows == []
    assert bad == [("undecodable picture", "cats:one.img")]


def test_a_page_of_html_is_an_undecodable_picture(tmp_path):
    rows, bad = commit_one(tmp_path, b"<html><body>404</body></html>")
    assert rows == []
    assert bad == [("undecodable picture", "cats:one.img")]


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded(picture(size=(1, 1)), "PNG"), (1, 1)),
        (encoded(picture(mode="CMYK")), (40, 30)),
        (encoded(Image.fromarray(np.full((30, 40), 40000, np.uint16)), "PNG"), (40, 30)),
        (
            encoded(picture(1), "GIF", save_all=True, append_images=[picture(2), picture(3)]),
            (40, 30),
        ),
        (encoded(picture(mode="L")), (40, 30)),
    ],
    ids=["one pixel", "CMYK JPEG", "16-bit PNG", "animated GIF", "gray JPEG"],
)
def test_unusual_pictures_are_kept_as_they_are(tmp_path, data, size):
    rows, bad = commit_one(tmp_path, data)
    assert rows[0]["image"] == data
    assert (rows[0]["width"], rows[0]["height"]) == size
    assert bad == []


def test_width_and_height_are_those_after_orientation(tmp_path):
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    rows, _bad = commit_one(tmp_path, encoded(image, exif=exif))
    assert (rows[0]["width"], rows[0]["height"]) == (30, 40)


def test_empty_captions_are_counted_and_the_others_kept(tmp_path):
    rows, bad = commit_one(tmp_path, encoded(picture()), ["", "a cat", " \n"])
    assert rows[0]["captions"] == ["a cat"]
    assert bad == [("empty caption", "cats:one.img")] * 2


def test_a_picture_with_only_empty_captions_is_left_out(tmp_path):
    rows, bad = commit_one(tmp_path, encoded(picture()), "")
    assert rows == []
    assert bad == [("empty caption", "cats:one.img"), ("no caption", "cats:one.img")]


@pytest.mark.parametrize(
    "caption",
    ["word " * 4999 + "end", "?!... --", "\U0001f600\U0001f680", "  Kept, As IT is  "],
    ids=["5,000 words", "punctuation", "emoji", "uncleaned"],
)
def test_unusual_captions_are_kept_whole(tmp_path, caption):
    rows, bad = commit_one(tmp_path, encoded(picture()), caption)
    assert rows[0]["captions"] == [caption]
    assert bad == []


def test_captions_become_nfc(tmp_path):
    rows, _bad = commit_one(tmp_path, encoded(picture()), "re\u0301al")
    assert rows[0]["captions"] == ["r\u00e9al"]


def test_half_a_surrogate_pair_does_not_stop_the_ingest(tmp_path):
    rows, _bad = commit_one(tmp_path, encoded(picture()), "cat \ud83d")
    assert rows[0]["captions"] == ["cat ?"]


def test_perceptual_hash_hardly_changes_when_a_picture_is_scaled_and_recompressed():
    image = Image.fromarray(decode_image(shapes_picture(0, 1).encoded))
    other = Image.fromarray(decode_image(shapes_picture(0, 2).encoded))
    small = decode_image(encoded(image.resize((70, 70)), quality=60))
    near = perceptual_hash(np.asarray(image)) ^ perceptual_hash(small)
    far = perceptual_hash(np.asarray(image)) ^ perceptual_hash(np.asarray(other))
    assert near.bit_count() <= 6
    assert far.bit_count() >= 16


# The forms of input.


def test_entries_of_one_picture_become_one_row(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(2)))
    source = write_list(
        tmp_path,
        [
            {"image": "a.jpg", "caption": "first"},
            {"image": "b.jpg", "caption": "other"},
            {"image": "a.jpg", "caption": ["second", "third"]},
        ],
    )
    rows, bad = commit(source, tmp_path / "out")
    assert [(row["image_id"], row["captions"]) for row in rows] == [
        ("cats:a.jpg", ["first", "second", "third"]),
        ("cats:b.jpg", ["other"]),
    ]
    assert bad == []


def test_a_list_named_after_its_split_takes_its_name_from_the_folder(tmp_path):
    folder = tmp_path / "flickr"
    folder.mkdir()
    write_tar(folder / "images.tar", {"7.jpg": encoded(picture())})
    source = write_list(
        folder, [{"image": "7.jpg", "image_id": 7, "caption": "a cat"}], "train.json"
    )
    (row,), bad = commit(source, tmp_path / "out")
    assert (row["image_id"], row["source"], row["split"]) == ("flickr:7", "flickr", "train")
    assert bad == []


def test_pictures_are_found_in_a_given_tar_by_the_tail_of_their_path(tmp_path):
    tar = write_tar(tmp_path / "all.tar", {"./coco/val/1.jpg": encoded(picture())})
    entry = {"image": "/export/data/coco/val/1.jpg", "image_id": "one", "caption": "a cat"}
    rows, bad = commit(write_list(tmp_path, [entry]), tmp_path / "out", images=tar)
    assert [row["image_id"] for row in rows] == ["cats:one"]
    assert bad == []


def test_pictures_are_found_in_a_given_folder_and_by_absolute_path(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(2)))
    entries = [
        {"image": "a.jpg", "caption": "a cat"},
        {"image": str(tmp_path / "b.jpg"), "image_id": "b", "caption": "a dog"},
    ]
    rows, bad = commit(write_list(tmp_path, entries), tmp_path / "out", images=folder)
    assert [row["image_id"] for row in rows] == ["cats:a.jpg", "cats:b"]
    assert bad == []


def test_a_tar_of_pictures_goes_with_the_list_beside_it(tmp_path):
    tar = write_tar(tmp_path / "all.tar", {"1.jpg": encoded(picture())})
    write_list(tmp_path, [{"image": "1.jpg", "caption": "a cat"}])
    rows, bad = commit(tar, tmp_path / "out")
    assert [row["captions"] for row in rows] == [["a cat"]]
    assert bad == []


def test_a_folder_stands_for_all_lists_in_it(tmp_path):
    folder = tmp_path / "flickr"
    folder.mkdir()
    write_tar(folder / "images.tar", {f"{i}.jpg": encoded(picture(i)) for i in range(2)})
    write_list(folder, [{"image": "0.jpg", "caption": "a cat"}], "train.json")
    write_list(folder, [{"image": "1.jpg", "caption": "a dog"}], "val.json")
    rows, _bad = commit(folder, tmp_path / "out")
    assert [(row["image_id"], row["split"]) for row in rows] == [
        ("flickr:0.jpg", "train"),
        ("flickr:1.jpg", "val"),
    ]


def test_bad_records_of_a_list_are_counted_by_class(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(2)))
    entries = [
        {"image": "a.jpg", "image_id": 1, "caption": "a cat"},
        {"image": "b.jpg", "image_id": 1, "caption": "a dog"},
        {"image": "gone.jpg", "caption": "nothing"},
        {"image": "x" * 5000, "caption": "a name too long"},
        {"image": "b.jpg"},
        {"image": "b.jpg", "caption": []},
        {"image": "b.jpg", "caption": 5},
        {"caption": "no picture"},
        "nonsense",
    ]
    rows, bad = commit(write_list(tmp_path, entries), tmp_path / "out")
    assert [row["captions"] for row in rows] == [["a cat"]]
    assert sorted(bad) == [
        ("duplicate id", "cats:1"),
        ("malformed record", "cats.json, b.jpg"),
        ("malformed record", "cats.json, entry 7"),
        ("malformed record", "cats.json, entry 8"),
        ("missing picture", "cats:gone.jpg"),
        ("missing picture", "cats:" + "x" * 5000),
        ("no caption", "cats.json, b.jpg"),
        ("no caption", "cats.json, b.jpg"),
    ]


def webdataset(folder: Path) -> None:
    first = {
        "000.jpg": encoded(picture(0)),
        "000.txt": b"a cat\n",
        "001.png": encoded(picture(1), "PNG"),
        "001.json": json.dumps({"caption": ["a dog", "a pet"], "url": "http://x/1"}).encode(),
        "002.jpg": encoded(picture(2)),
        "003.txt": b"no picture",
        "004.jpg": encoded(picture(4)),
        "004.json": b"{broken",
    }
    write_tar(folder / "00000.tar", first)
    write_tar(
        folder / "00001.tar", {"000.jpg": encoded(picture(5)), "000.txt": b"\xc3\xa9t\xc3\xa9 \xff"}
    )


def test_webdataset_tars_give_a_row_for_each_picture_with_a_caption(tmp_path):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    webdataset(folder)
    rows, bad = commit(folder / "*.tar", tmp_path / "out")
    assert [(row["image_id"], row["captions"], row["url"]) for row in rows] == [
        ("cc3m:00000/000", ["a cat"], None),
        ("cc3m:00000/001", ["a dog", "a pet"], "http://x/1"),
        ("cc3m:00001/000", ["\u00e9t\u00e9 \ufffd"], None),
    ]
    assert sorted(bad) == [
        ("malformed record", "cc3m:00000/004"),
        ("missing picture", "cc3m:00000/003"),
        ("no caption", "cc3m:00000/002"),
    ]


def test_of_a_tar_cut_short_the_rest_is_used(tmp_path):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    webdataset(folder)
    tar = folder / "00000.tar"
    os.truncate(tar, tar.read_bytes().index(b"001.png\0") + 512 + 60)
    rows, bad = commit(folder / "*.tar", tmp_path / "out")
    assert [row["image_id"] for row in rows] == ["cc3m:00000/000", "cc3m:00001/000"]
    assert ("unreadable file", str(tar)) in bad


def test_of_a_tar_damaged_in_the_middle_the_beginning_is_used(tmp_path):
    folder = tmp_path / "cc3m"
    folder.mkdir()
    webdataset(folder)
    data = bytearray((folder / "00000.tar").read_bytes())
    start = data.index(b"001.png\0")
    data[start : start + 512] = b"\x7f" * 512
    (folder / "00000.tar").write_bytes(data)
    rows, bad = commit(folder / "*.tar", tmp_path / "out")
    assert [row["image_id"] for row in rows] == ["cc3m:00000/000", "cc3m:00001/000"]
    assert ("unreadable file", str(folder / "00000.tar")) in bad


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "nowhere.json", "no such file.*Accepted are `shapes`"),
        ({}, "*.tar", "nothing that matches"),
        ({}, ".", r"neither \*\.json nor"),
        ({"a.csv": b"x"}, "a.csv", r"found a\.csv\. Accepted are"),
        ({"a.json": b"{bad"}, "a.json", "not JSON"),
        ({"a.json": b'{"images": [], "info": 1}'}, "a.json", "an object with images, info, not a"),
        ({"a.tar": b"x" * 2000}, "a.tar", "a tar without captions, with no JSON list"),
    ],
)
def test_other_input_is_refused_with_what_is_accepted(tmp_path, files, source, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        ingest(config_of(tmp_path / source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Whole ingests, through Ray.


@pytest.fixture
def shapes_config(tmp_path: Path) -> IngestConfig:
    return config_of("shapes", tmp_path / "out", num_images=50, rows_per_shard=16, rows_per_group=8)


@pytest.mark.cluster
def test_a_corpus_holds_every_picture_once_in_full_row_groups(shapes_config, local_ray):
    report = ingest(shapes_config)
    manifest = read_manifest(shapes_config.out)
    assert [group.rows for group in manifest.row_groups()] == [8] * 6 + [2]
    tables = list(read_columns(manifest, SCHEMA.names))
    assert all(table.schema.equals(SCHEMA) for table in tables)
    ids = [name for table in tables for name in table["image_id"].to_pylist()]
    assert sorted(ids) == [f"shapes-0:{number:07d}" for number in range(50)]
    assert ids != sorted(ids)
    assert (report.num_images, report.num_captions, report.bad) == (50, 150, [])
    assert sum(len(captions) for captions in read_captions(manifest)) == manifest.num_captions
    assert report.content_id == manifest.content_id
    assert manifest.settings["seed"] == 0


@pytest.mark.cluster
def test_content_id_does_not_depend_on_sharding(tmp_path, local_ray):
    one, two = (
        ingest(config_of("shapes", tmp_path / str(rows), num_images=20, rows_per_shard=rows))
        for rows in (7, 100)
    )
    assert one.num_shards == 3
    assert two.num_shards == 1
    assert one.content_id == two.content_id


@pytest.mark.cluster
def test_a_killed_task_is_done_again(shapes_config, tmp_path, monkeypatch, local_ray):
    expected = ingest(shapes_config).content_id
    marker, commit_once_more = tmp_path / "killed", ingest_units._commit_batch

    def commit_and_die_once(batch, **options):
        whole = ingest_units.decode_image

        def decode(data):
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(data)

        ingest_units.decode_image = decode
        try:
            return commit_once_more(batch, **options)
        finally:
            ingest_units.decode_image = whole

    monkeypatch.setattr(ingest_units, "_commit_batch", commit_and_die_once)
    report = ingest(config_of("shapes", tmp_path / "again", num_images=50, rows_per_shard=16))
    assert marker.exists()
    assert report.content_id == expected
    assert list((tmp_path / "again" / "shards").glob("*.tmp")) == []


@pytest.mark.cluster
def test_bad_input_is_named_in_the_report_and_does_not_stop_the_run(tmp_path, local_ray):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture(number)))
    (tmp_path / "1.jpg").write_bytes(b"not a picture")
    entries = [{"image": f"{number}.jpg", "caption": "<b>a cat</b>"} for number in range(5)]
    report = ingest(config_of(write_list(tmp_path, entries), tmp_path / "out"))
    assert report.num_images == 3
    assert report.bad_counts == {"missing picture": 1, "undecodable picture": 1}
    folder = tmp_path / "out" / "report"
    written = json.loads((folder / "report.json").read_text())
    assert written["bad_names"]["undecodable picture"][0]["name"] == "cats:1.jpg"
    assert "`cats:4.jpg`" in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == 3
    assert "&lt;b&gt;a cat&lt;/b&gt;" in page


@pytest.mark.cluster
def test_too_much_bad_input_stops_without_a_manifest(tmp_path, local_ray):
    (tmp_path / "0.jpg").write_bytes(encoded(picture()))
    (tmp_path / "1.jpg").write_bytes(b"not a picture")
    (tmp_path / "2.jpg").write_bytes(b"not a picture")
    entries = [{"image": f"{number}.jpg", "caption": "a cat"} for number in range(3)]
    config = config_of(write_list(tmp_path, entries), tmp_path / "out", max_bad_share=0.6)
    with pytest.raises(InputError, match=r"2 of 3 pictures \(66\.7%\) are unusable"):
        ingest(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "cats:2.jpg" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_a_source_without_a_usable_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match="not one usable picture"):
        ingest(config_of(write_list(tmp_path, []), tmp_path / "out"))


def test_a_finished_corpus_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="a corpus never changes"):
        ingest(config_of("shapes", tmp_path))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        ingest(config_of("shapes", tmp_path / "out"))


@pytest.mark.cluster
def test_leftovers_of_an_interrupted_ingest_are_replaced(shapes_config, local_ray):
    shards = shapes_config.out / "shards"
    shards.mkdir(parents=True)
    for name in ("shard-00000.parquet", "shard-00099.parquet", "shard-00001.parquet.1.tmp"):
        (shards / name).write_text("half")
    (shapes_config.out / "notes.txt").write_text("mine")
    ingest(shapes_config)
    found = sorted(path.name for path in shards.iterdir())
    assert found == [f"shard-{number:05d}.parquet" for number in range(4)]
    assert (shapes_config.out / "notes.txt").read_text() == "mine"


@pytest.mark.cluster
def test_progress_ends_at_the_number_of_pictures(shapes_config, local_ray):
    told = []
    ingest(shapes_config, on_progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (50, 50)
    assert told == sorted(told)


@pytest.mark.reference
def test_flickr8k_is_read_from_its_tar(tmp_path):
    source = Path(__file__).parents[3] / "shared" / "data" / "flickr8k" / "val.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    listing = list_records(config_of(source, tmp_path))
    expected = json.loads(source.read_text())
    assert listing.bad == []
    assert [record.image_id for record in listing.records] == [
        f"flickr8k:{entry['image_id']}" for entry in expected
    ]
    summary = commit_unit(
        Unit("shard-00000.parquet", listing.records[:50]), folder=tmp_path, rows_per_group=256
    )
    assert (summary.num_captions, summary.bad) == (250, [])
