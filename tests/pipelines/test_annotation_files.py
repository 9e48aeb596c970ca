"""Files that are one object: Karpathy's splits, VQA v2, COCO."""

import json
from pathlib import Path

import pytest

from albef_core.errors import InputError
from pipelines.sources import list_records
from tests.pipelines.ingest_sources import (
    commit,
    config_of,
    encoded,
    picture,
    told,
    write_pictures,
    write_tar,
)

# Karpathy's splits.


def karpathy(folder: Path) -> Path:
    names = ("train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg")
    write_pictures(folder, *names)
    images = [
        {
            "filepath": name.partition("/")[0],
            "filename": name.partition("/")[2],
            "cocoid": int(name[-16:-4]),
            "split": split,
            "sentences": [{"raw": f"{split} one"}, {"raw": f"{split} two"}],
        }
        for name, split in zip(names, ("restval", "test"), strict=True)
    ]
    images += [
        {**images[0], "filename": "COCO_train2014_000000000010.jpg", "cocoid": 10},
        {**images[0], "sentences": []},
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"dataset": "coco", "images": images}))
    return path


def test_karpathy_s_json_gives_captions_and_splits(tmp_path):
    rows, bad = commit(karpathy(tmp_path), tmp_path / "out")
    assert [(row["image_id"], row["captions"], row["split"]) for row in rows] == [
        ("coco:42", ["test one", "test two"], "test"),
        ("coco:9", ["restval one", "restval two"], "restval"),
    ]
    assert bad == [
        ("no caption", "dataset_coco.json, COCO_train2014_000000000009.jpg"),
        ("missing picture", "coco:10"),
    ]


def test_a_split_is_kept_and_pictures_of_the_others_are_not_looked_for(tmp_path):
    rows, bad = commit(karpathy(tmp_path), tmp_path / "out", split="test")
    assert [row["image_id"] for row in rows] == ["coco:42"]
    assert ("missing picture", "coco:10") not in bad


def test_a_split_that_the_source_lacks_is_refused(tmp_path):
    config = config_of(karpathy(tmp_path), tmp_path / "out", split="dev")
    with pytest.raises(InputError, match="--split dev: the source has restval, test"):
        list_records(config)


def test_flickr30k_of_karpathy_has_its_pictures_in_one_folder(tmp_path):
    write_pictures(tmp_path / "flickr30k-images", "100.jpg")
    image = {"filename": "100.jpg", "imgid": 0, "split": "val", "sentences": [{"raw": "a man"}]}
    body = {"dataset": "flickr30k", "images": [image]}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(body))
    rows, bad = commit(
        tmp_path / "dataset_flickr30k.json",
        tmp_path / "out",
        images=tmp_path / "flickr30k-images",
    )
    assert [(row["image_id"], row["split"]) for row in rows] == [("flickr30k:100", "val")]
    assert bad == []


def test_a_split_of_webdataset_tars_is_that_of_their_names(tmp_path):
    for number, split in enumerate(("train", "val")):
        members = {"0.jpg": encoded(picture(number)), "0.txt": b"a cat"}
        write_tar(tmp_path / f"cats-{split}-000.tar", members)
    rows, _bad = commit(tmp_path / "*.tar", tmp_path / "out", split="val")
    assert [row["image_id"] for row in rows] == ["cats:cats-val-000/0"]
    with pytest.raises(InputError, match="--split test: the source has train, val"):
        list_records(config_of(tmp_path / "*.tar", tmp_path / "out", split="test"))


# VQA v2.


def vqa(folder: Path) -> tuple[Path, Path]:
    write_pictures(folder, "train2014/COCO_train2014_000000000009.jpg")
    questions = [
        {"image_id": 9, "question": "what?", "question_id": 9000},
        {"image_id": 9, "question": "how many?", "question_id": 9001},
        {"image_id": 10, "question": "where?", "question_id": 10000},
        {"question": "of nothing?", "question_id": 1},
    ]
    answers = [
        {
            "question_id": 9000,
            "image_id": 9,
            "question_type": "what",
            "answer_type": "other",
            "answers": [
                {"answer": text, "answer_id": number + 1}
                for number, text in enumerate(["cat"] * 7 + ["dog"] * 3)
            ],
        },
        {"question_id": 10000, "image_id": 10, "answers": [{"answer": "here"}]},
        {"question_id": 7, "image_id": 9, "answers": [{"answer": "unasked"}]},
    ]
    paths = (
        folder / "v2_OpenEnded_mscoco_train2014_questions.json",
        folder / "v2_mscoco_train2014_annotations.json",
    )
    paths[0].write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    paths[1].write_text(json.dumps({"data_subtype": "train2014", "annotations": answers}))
    return paths


def test_vqa_questions_find_their_ten_answers_in_the_second_file(tmp_path):
    questions, answers = vqa(tmp_path)
    rows, bad = commit(questions, tmp_path / "out", annotations=(answers,))
    assert told(rows) == {
        "coco:9": {
            "questions": [
                {
                    "question": "what?",
                    "answers": ["cat"] * 7 + ["dog"] * 3,
                    "id": 9000,
                    "type": "what",
                    "answer_type": "other",
                }
            ]
        }
    }
    assert [row["split"] for row in rows] == ["train"]
    name = questions.name
    assert bad == [
        ("question without answer", f"{name}, question 9001 (entry 1)"),
        ("malformed record", f"{name}, question 1 (entry 3)"),
        ("answers without their question", f"{name}, question 7"),
        ("missing picture", "coco:10"),
    ]


def test_vqa_questions_without_the_second_file_are_refused(tmp_path):
    questions, answers = vqa(tmp_path)
    with pytest.raises(InputError, match=r"VQA questions without answers.*--annotations"):
        list_records(config_of(questions, tmp_path / "out"))
    with pytest.raises(InputError, match="pass the questions as --source"):
        list_records(config_of(answers, tmp_path / "out"))


def test_vqa_questions_of_test_dev_need_no_second_file(tmp_path):
    write_pictures(tmp_path, "COCO_test2015_000000000001.jpg")
    questions = [{"image_id": 1, "question": "what?", "question_id": 1000}]
    source = tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    source.write_text(json.dumps({"data_subtype": "test-dev2015", "questions": questions}))
    rows, bad = commit(source, tmp_path / "out")
    assert told(rows) == {
        "coco:1": {"questions": [{"question": "what?", "answers": [], "id": 1000}]}
    }
    assert [row["split"] for row in rows] == ["test"]
    assert bad == []


# COCO.


def coco(folder: Path) -> tuple[Path, Path]:
    names = {7: "000000000007.jpg", 8: "000000000008.jpg", 9: "000000000009.jpg"}
    tar = {name: encoded(picture(number)) for number, name in names.items()}
    write_tar(folder / "val2017.tar", tar)
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    captions = [
        {"image_id": 7, "id": 1, "caption": "a cat"},
        {"image_id": 8, "id": 2, "caption": "a dog"},
        {"image_id": 7, "id": 3, "caption": "a pet"},
        {"image_id": 99, "id": 4, "caption": "of nothing"},
        {"image_id": 7, "id": 5},
    ]
    boxes = [
        {"image_id": 7, "id": 70, "category_id": 1, "bbox": [1.5, 2, 10, 10], "iscrowd": 0},
        {"image_id": 7, "id": 71, "category_id": 2, "bbox": [30, 20, 15, 5], "iscrowd": 0},
        {"image_id": 8, "id": 80, "category_id": 1, "bbox": [50, 0, 5, 5], "iscrowd": 0},
        {"image_id": 8, "id": 81, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        {"image_id": 8, "id": 82, "category_id": 1, "bbox": [0, 0, 0, 30], "iscrowd": 0},
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "hot dog"}]
    paths = folder / "captions_val2017.json", folder / "instances_val2017.json"
    paths[0].write_text(json.dumps({"images": images, "annotations": captions}))
    body = {"images": images[:2], "annotations": boxes, "categories": categories}
    paths[1].write_text(json.dumps(body))
    return paths


COCO_BOXES = {
    "objects": [
        {"box": [1.5, 2, 10, 10], "category": "cat", "id": 70},
        {"box": [30, 20, 10, 5], "category": "hot dog", "id": 71},
    ]
}
COCO_BAD = [
    ("box clipped to the picture", "coco:7"),
    ("box of a crowd", "instances_val2017.json, object 81"),
    ("box outside the picture", "coco:8"),
    ("malformed record", "captions_val2017.json, entry 3"),
    ("neither caption nor annotation", "coco:9"),
    ("no caption", "captions_val2017.json, entry 4"),
    ("not a box", "instances_val2017.json, object 82"),
]


def test_coco_captions_are_joined_with_the_boxes_of_their_pictures(tmp_path):
    captions, instances = coco(tmp_path)
    rows, bad = commit(captions, tmp_path / "out", annotations=(instances,))
    assert [(row["image_id"], row["captions"]) for row in rows] == [
        ("coco:7", ["a cat", "a pet"]),
        ("coco:8", ["a dog"]),
    ]
    assert told(rows) == {"coco:7": COCO_BOXES, "coco:8": {"objects": []}}
    assert sorted(bad) == COCO_BAD


def test_a_folder_of_coco_joins_its_files(tmp_path):
    coco(tmp_path)
    rows, bad = commit(tmp_path, tmp_path / "out")
    assert told(rows) == {"coco:7": COCO_BOXES, "coco:8": {"objects": []}}
    assert sorted(bad) == COCO_BAD


def test_coco_instances_alone_are_a_source(tmp_path):
    _captions, instances = coco(tmp_path)
    rows, _bad = commit(instances, tmp_path / "out")
    assert [(row["captions"], row["split"]) for row in rows] == [([], "val")] * 2
    assert told(rows)["coco:7"] == COCO_BOXES
