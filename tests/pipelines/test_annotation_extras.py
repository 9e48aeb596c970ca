"""What `--annotations` adds: boxes of RefCOCO+, detector proposals."""

import json
from pathlib import Path

import pytest

from albef_core.errors import InputError
from pipelines.sources import list_records
from tests.pipelines.ingest_sources import (
    commit,
    config_of,
    told,
    write_list,
    write_pictures,
)


def refcoco(folder: Path) -> Path:
    write_pictures(folder, "COCO_train2014_000000000009.jpg", "COCO_train2014_000000000010.jpg")
    entries = [
        {"image": "COCO_train2014_000000000009.jpg", "text": "left cat", "ref_id": 5},
        {"image": "COCO_train2014_000000000009.jpg", "text": "gray one", "ref_id": 5},
        {"image": "COCO_train2014_000000000010.jpg", "text": "the dog", "ref_id": 6},
    ]
    return write_list(folder, entries, "refcoco+_val.json")


def test_expressions_take_their_boxes_from_a_file_and_pictures_their_proposals(tmp_path):
    source = refcoco(tmp_path)
    boxes, dets = tmp_path / "boxes.txt", tmp_path / "dets.txt"
    boxes.write_text(json.dumps({"5": [1, 2, 3, 4]}))
    dets.write_text(
        json.dumps({"9": [[0, 0, 9, 9, 0.7], [38, 0, 9, 9]], "10": [], "11": [[0] * 4]})
    )
    rows, bad = commit(source, tmp_path / "out", annotations=(boxes, dets))
    assert told(rows) == {
        "refcoco+:COCO_train2014_000000000009.jpg": {
            "objects": [
                {"box": [1, 2, 3, 4], "expression": "left cat", "id": 5},
                {"box": [1, 2, 3, 4], "expression": "gray one", "id": 5},
            ],
            "proposals": [[0, 0, 9, 9], [38, 0, 2, 9]],
        }
    }
    dog = "refcoco+:COCO_train2014_000000000010.jpg"
    assert sorted(bad) == [
        ("box clipped to the picture", "refcoco+:COCO_train2014_000000000009.jpg"),
        ("expression without box", dog),
        ("neither caption nor annotation", dog),
    ]


def test_a_list_of_detections_gives_proposals_too(tmp_path):
    dets = [
        {"box": [0, 0, 9, 9], "image_id": 9, "score": 0.9},
        {"box": [1, 1, 0, 9], "image_id": 9},
        {"box": [2, 2, 5, 5]},
        {"box": [2, 2, 5, 5], "image_id": 9},
    ]
    source = refcoco(tmp_path)
    extra = tmp_path / "dets.txt"
    extra.write_text(json.dumps(dets))
    rows, bad = commit(source, tmp_path / "out", annotations=(extra,))
    found = told(rows)["refcoco+:COCO_train2014_000000000009.jpg"]["proposals"]
    assert found == [[0, 0, 9, 9], [2, 2, 5, 5]]
    assert sorted(bad) == [
        ("malformed record", "dets.txt, entry 2"),
        ("not a box", "refcoco+:COCO_train2014_000000000009.jpg"),
    ]


def test_expressions_for_training_alone_need_no_boxes(tmp_path):
    rows, bad = commit(refcoco(tmp_path), tmp_path / "out")
    assert told(rows)["refcoco+:COCO_train2014_000000000010.jpg"] == {
        "objects": [{"expression": "the dog", "id": 6}]
    }
    assert bad == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{bad", "not JSON"),
        ("{}", "none of these: VQA v2 answers"),
        ('{"a": 5}', "none of these"),
        ("[5]", "none of these"),
        ('[{"image": "a.jpg"}]', "none of these"),
        ('{"77": [1, 2, 3, 4]}', "boxes belong to no picture of refcoco"),
        ('{"77": [[1, 2, 3, 4]]}', "proposals belong to no picture of refcoco"),
    ],
)
def test_other_annotations_are_refused_in_one_line(tmp_path, text, message):
    extra = tmp_path / "extra.txt"
    if text is not None:
        extra.write_text(text)
    config = config_of(refcoco(tmp_path), tmp_path / "out", annotations=(extra,))
    with pytest.raises(InputError, match=message):
        list_records(config)
