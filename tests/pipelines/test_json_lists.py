"""Lists as a whole: what is refused, what the report says, the real samples in `../shared`."""

import json
from collections import Counter
from pathlib import Path

import pytest

from albef_core.errors import InputError
from pipelines.ingest import ingest
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import Unit, commit_unit
from pipelines.records import count_bad
from pipelines.sources import list_records
from tests.pipelines.ingest_sources import (
    config_of,
    encoded,
    picture,
    write_list,
    write_pictures,
    write_tar,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


# What is refused.


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.json", [{"file": "a.jpg", "words": "b"}], "not one known entry; the first has file, w"),
        ("a.json", ["x"], "not one known entry; the first has x"),
        ("a.jsonl", {"file": "a.jpg"}, "not one known entry"),
        ("a.json", {"images": [{"id": 1}], "annotations": []}, "object with images, annotations"),
        ("a.json", {}, "an object with nothing"),
        ("a.json", 5, "the JSON is a value"),
    ],
)
def test_json_of_no_known_form_is_refused_with_what_is_known(tmp_path, name, body, message):
    (tmp_path / name).write_text(json.dumps(body))
    with pytest.raises(InputError, match=message):
        ingest(config_of(tmp_path / name, tmp_path / "out"))


def test_flags_of_lists_are_refused_with_the_generated_set(tmp_path):
    with pytest.raises(InputError, match="--split does not go with `shapes`"):
        list_records(config_of("shapes", tmp_path, split="val"))
    with pytest.raises(InputError, match="--annotations does not go with `shapes`"):
        list_records(config_of("shapes", tmp_path, annotations=(tmp_path,)))


def test_too_many_bad_entries_stop_although_every_picture_is_good(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    asked = {"image": "a.jpg", "question": "what?"}
    source = write_list(tmp_path, [{**asked, "answer": "cat"}, *([asked] * 3)])
    with pytest.raises(InputError, match=r"3 of 4 entries \(75\.0%\) are unusable"):
        ingest(config_of(source, tmp_path / "out"))
    assert "question without answer" in (tmp_path / "out" / "report" / "report.md").read_text()


# A whole ingest, through Ray.


@pytest.mark.cluster
def test_the_report_counts_what_is_asked_and_names_pairs_whose_left_picture_is_broken(
    tmp_path, local_ray
):
    write_pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    entries = [
        {"image": "a.jpg", "question": "<what>?", "answer": ["cat", "cat", "dog"]},
        {"image": "b.jpg", "question": "who?", "answer": "cat"},
        {"image": "b.jpg", "sentence": "a man", "label": "neutral"},
        {"images": ["a.jpg", "c.jpg"], "sentence": "two cats", "label": "True"},
        {"images": ["broken.jpg", "c.jpg"], "sentence": "one cat", "label": "True"},
    ]
    config = IngestConfig(
        source=str(write_list(tmp_path, entries)), out=tmp_path / "out", rows_per_shard=1
    )
    report = ingest(config)
    assert (report.num_images, report.num_captions, report.num_uncaptioned) == (3, 0, 3)
    assert report.annotations == {"questions": 2, "answers": 4, "statements": 1, "pairs": 2}
    assert report.num_answers == 2
    assert report.bad_counts == {"pair without its left picture": 1, "undecodable picture": 1}
    facts = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert (facts["questions"], facts["distinct answers"]) == (2, 2)
    assert facts["images without a caption"] == 3
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "&lt;what&gt;? cat, dog" in page


# Real samples.


def listed(source: str, **options) -> tuple[list, dict[str, int], Counter[str]]:
    """List a sample under `../shared/data` and commit 40 of its pictures."""
    if not (SHARED / source).exists():
        pytest.skip(f"{SHARED / source} is not there")
    out = options.pop("out")
    listing = list_records(config_of(SHARED / source, out, **options))
    unit = Unit("shard-00000.parquet", listing.records[:40])
    summary = commit_unit(unit, folder=out, rows_per_group=256)
    return listing.records, count_bad([*listing.bad, *summary.bad]), summary.annotations


@pytest.mark.reference
def test_daquar_is_read(tmp_path):
    records, bad, counts = listed("daquar/train.json", out=tmp_path)
    questions = [
        asked for record in records for asked in json.loads(record.annotations)["questions"]
    ]
    entries = json.loads((SHARED / "daquar" / "train.json").read_text())
    expected = sorted((e["question_id"], e["question"], e["answer"]) for e in entries)
    assert sorted((q["id"], q["question"], q["answers"]) for q in questions) == expected
    assert bad == {}
    assert counts["questions"] > 40


@pytest.mark.reference
def test_snli_ve_rows_find_the_pictures_of_flickr8k(tmp_path):
    images = SHARED / "flickr8k" / "images.tar"
    records, bad, _counts = listed("snli_ve/dev.jsonl", out=tmp_path, images=images)
    found = Counter(
        (record.image_id.partition(":")[2], stated["sentence"], stated["label"], stated["id"])
        for record in records
        for stated in json.loads(record.annotations)["entailment"]
    )
    lines = (SHARED / "snli_ve" / "dev.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert found == Counter((e["image"], e["sentence"], e["label"], e["pairID"]) for e in entries)
    assert bad == {}


@pytest.mark.reference
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_captions_and_boxes_are_joined(tmp_path, split):
    captions, instances = (
        f"coco_mini/{what}_{split}2017.json" for what in ("captions", "instances")
    )
    records, bad, _counts = listed(captions, out=tmp_path, annotations=(SHARED / instances,))
    body = json.loads((SHARED / instances).read_text())
    names = {one["id"]: one["name"] for one in body["categories"]}
    expected = Counter(
        (f"coco:{one['image_id']}", *one["bbox"], names[one["category_id"]])
        for one in body["annotations"]
        if not one["iscrowd"]
    )
    found = Counter(
        (record.image_id, *thing["box"], thing["category"])
        for record in records
        for thing in json.loads(record.annotations or "{}").get("objects", [])
    )
    assert found == expected
    assert bad == {"box of a crowd": sum(one["iscrowd"] for one in body["annotations"])}
    assert sum(len(record.captions) for record in records) == len(
        json.loads((SHARED / captions).read_text())["annotations"]
    )


@pytest.mark.reference
def test_nlvr2_rows_find_pictures_by_their_official_names(tmp_path):
    source = SHARED / "nlvr2" / "dev_400.jsonl"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    entries = [json.loads(line) for line in source.read_text().splitlines()]
    stems = sorted({entry["identifier"].rpartition("-")[0] for entry in entries})
    there = stems[:-10]
    data = encoded(picture())
    members = {f"{stem}-img{side}.png": data for stem in there for side in (0, 1)}
    tar = write_tar(tmp_path / "dev.tar", members)
    listing = list_records(config_of(source, tmp_path / "out", images=tar))
    assert len(listing.records) == 2 * len(there)
    assert count_bad(listing.bad) == {"missing picture": 20}
    found = {
        pair["id"]: (record.image_id, pair["left"], pair["label"], pair["sentence"])
        for record in listing.records
        for pair in json.loads(record.annotations).get("pairs", [])
    }
    assert found == {
        entry["identifier"]: (
            f"nlvr2:{stem}-img1",
            f"nlvr2:{stem}-img0",
            entry["label"] == "True",
            entry["sentence"],
        )
        for entry in entries
        if (stem := entry["identifier"].rpartition("-")[0]) in there
    }
