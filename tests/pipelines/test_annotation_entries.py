"""Lists of one entry a question, statement, pair or expression: ALBEF's, SNLI-VE, NLVR2."""

from collections import Counter

from pipelines.sources import list_records
from tests.pipelines.ingest_sources import (
    commit,
    config_of,
    told,
    write_lines,
    write_list,
    write_pictures,
)

# ALBEF's own lists.


def test_questions_of_one_picture_become_one_row_with_all_answers(tmp_path):
    write_pictures(tmp_path, "a.jpg", "b.jpg")
    entries = [
        {"image": "a.jpg", "question": "what is it?", "answer": ["cat", "cat"], "question_id": 1},
        {"image": "b.jpg", "question": "who?", "answer": "anna", "dataset": "vg"},
        {
            "image": "a.jpg",
            "question": "how many?",
            "answer": ["2", " ", "3"],
            "question_type": "how many",
            "answer_type": "number",
        },
    ]
    rows, bad = commit(write_list(tmp_path, entries, "vqa_train.json"), tmp_path / "out")
    assert told(rows) == {
        "vqa:a.jpg": {
            "questions": [
                {"question": "what is it?", "answers": ["cat", "cat"], "id": 1},
                {
                    "question": "how many?",
                    "answers": ["2", "3"],
                    "type": "how many",
                    "answer_type": "number",
                },
            ]
        },
        "vqa:b.jpg": {"questions": [{"question": "who?", "answers": ["anna"], "dataset": "vg"}]},
    }
    assert [(row["captions"], row["split"]) for row in rows] == [([], "train")] * 2
    assert bad == []


def test_questions_of_a_test_split_are_kept_without_answers_for_their_ids(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    entries = [{"image": "a.jpg", "question": "who?", "question_id": 7, "dataset": "vqa"}]
    rows, bad = commit(write_list(tmp_path, entries, "vqa_test.json"), tmp_path / "out")
    (asked,) = told(rows)["vqa:a.jpg"]["questions"]
    assert asked == {"question": "who?", "answers": [], "id": 7, "dataset": "vqa"}
    assert bad == []


def test_kinds_of_entries_may_be_mixed(tmp_path):
    write_pictures(tmp_path, "1.jpg")
    entries = [
        {"image": "1.jpg", "image_id": 1, "caption": "a cat"},
        {"image": "1.jpg", "sentence": "an animal", "label": "entailment"},
        {"image": "1.jpg", "text": "the cat", "ref_id": 5, "box": [1, 2, 3, 4]},
        {"image": "1.jpg", "question": "what?", "answer": "cat", "caption": "a pet"},
    ]
    rows, bad = commit(write_list(tmp_path, entries), tmp_path / "out")
    assert [row["captions"] for row in rows] == [["a cat", "a pet"]]
    assert told(rows) == {
        "cats:1": {
            "entailment": [{"sentence": "an animal", "label": "entailment"}],
            "objects": [{"box": [1, 2, 3, 4], "expression": "the cat", "id": 5}],
            "questions": [{"question": "what?", "answers": ["cat"]}],
        }
    }
    assert bad == []


def test_pairs_stand_with_the_right_picture_and_name_the_left_one(tmp_path):
    write_pictures(tmp_path, "dev/a-img0.png", "dev/a-img1.png")
    entries = [
        {"images": ["dev/a-img0.png", "dev/a-img1.png"], "sentence": "two cats", "label": "True"},
        {"images": ["dev/a-img0.png", "dev/a-img1.png"], "sentence": "no cat", "label": "False"},
        {"images": ["dev/a-img0.png", "dev/gone.png"], "sentence": "lost", "label": "True"},
        {"images": ["dev/left.png", "dev/a-img1.png"], "sentence": "halved", "label": "True"},
        {"images": ["dev/a-img0.png", "dev/a-img1.png"], "sentence": "odd", "label": "maybe"},
        {"images": ["dev/a-img0.png"], "sentence": "alone", "label": "True"},
    ]
    rows, bad = commit(write_list(tmp_path, entries, "nlvr_dev.json"), tmp_path / "out")
    assert told(rows) == {
        "nlvr:dev/a-img0.png": {},
        "nlvr:dev/a-img1.png": {
            "pairs": [
                {"left": "nlvr:dev/a-img0.png", "sentence": "two cats", "label": True},
                {"left": "nlvr:dev/a-img0.png", "sentence": "no cat", "label": False},
            ]
        },
    }
    assert sorted(bad) == [
        ("malformed record", "nlvr_dev.json, entry 5"),
        ("missing picture", "nlvr:dev/gone.png"),
        ("missing picture", "nlvr:dev/left.png"),
        ("pair without its left picture", "nlvr:dev/a-img1.png"),
        ("unknown label", "nlvr_dev.json, entry 4"),
    ]


def test_bad_entries_are_counted_by_class_and_cost_no_picture(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    entries = [
        {"image": "a.jpg", "question": "what?", "answer": "cat"},
        {"image": "a.jpg", "question": "when?"},
        {"image": "a.jpg", "question": "where?", "answer": []},
        {"image": "a.jpg", "question": "who?", "answer": ["", " "]},
        {"image": "a.jpg", "question": " ", "answer": "cat"},
        {"image": "a.jpg", "question": "why?", "answer": 5},
        {"image": "a.jpg", "question": 5, "answer": "cat"},
        {"image": "a.jpg", "sentence": "a cat", "label": "-"},
        {"image": "a.jpg", "sentence": "a cat", "label": "perhaps"},
        {"image": "a.jpg", "sentence": "a cat"},
        {"image": "a.jpg", "text": "the cat", "box": [1, 2, 3]},
        {"image": 5, "question": "what?", "answer": "cat"},
        {"question": "without a picture?", "answer": "cat"},
    ]
    rows, bad = commit(write_list(tmp_path, entries), tmp_path / "out")
    assert told(rows) == {"cats:a.jpg": {"questions": [{"question": "what?", "answers": ["cat"]}]}}
    assert Counter(kind for kind, _name in bad) == {
        "question without answer": 3,
        "empty text": 1,
        "malformed record": 4,
        "no gold label": 1,
        "unknown label": 2,
        "not a box": 1,
    }
    assert {name for _kind, name in bad} == {
        "cats.json, a.jpg",
        "cats.json, entry 11",
        "cats.json, entry 12",
    }


def test_what_is_lost_with_a_missing_picture_is_said(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    asked = {"question": "what?", "answer": "cat"}
    entries = [{"image": name, **asked} for name in ("gone.jpg", "a.jpg", "gone.jpg")]
    listing = list_records(config_of(write_list(tmp_path, entries), tmp_path / "out"))
    (bad,) = listing.bad
    assert bad.detail.endswith("; with it 2 questions")


def test_texts_become_nfc_without_halves_of_surrogates(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    entry = {"image": "a.jpg", "question": "re\u0301al?", "answer": ["\ud83d!"]}
    rows, _bad = commit(write_list(tmp_path, [entry]), tmp_path / "out")
    (asked,) = told(rows)["cats:a.jpg"]["questions"]
    assert asked == {"question": "r\u00e9al?", "answers": ["?!"]}


# SNLI-VE.


def test_official_snli_ve_lines_leave_out_what_has_no_gold_label(tmp_path):
    write_pictures(tmp_path / "pictures", "12.jpg", "13.jpg")
    entries = [
        {"Flickr30K_ID": "12", "sentence2": "a man", "gold_label": "neutral", "pairID": "12#0n"},
        {"Flickr30K_ID": "13.jpg", "sentence2": "a dog", "gold_label": "contradiction"},
        {"Flickr30K_ID": "12", "sentence2": "a hat", "gold_label": "-", "pairID": "12#1n"},
    ]
    source = write_lines(tmp_path / "snli_ve_test.jsonl", entries)
    rows, bad = commit(source, tmp_path / "out", images=tmp_path / "pictures")
    assert told(rows) == {
        "flickr30k:12": {"entailment": [{"sentence": "a man", "label": "neutral", "id": "12#0n"}]},
        "flickr30k:13": {"entailment": [{"sentence": "a dog", "label": "contradiction"}]},
    }
    assert [row["split"] for row in rows] == ["test", "test"]
    assert bad == [("no gold label", "snli_ve_test.jsonl, line 3")]


def test_pictures_named_without_suffix_are_found(tmp_path):
    write_pictures(tmp_path, "12.jpg")
    entry = {"image": "12", "sentence": "a man", "label": "entailment"}
    rows, bad = commit(write_list(tmp_path, [entry], "ve_dev.json"), tmp_path / "out")
    assert [row["image_id"] for row in rows] == ["ve:12"]
    assert bad == []


def test_a_line_that_is_no_json_is_counted(tmp_path):
    write_pictures(tmp_path, "a.jpg")
    source = tmp_path / "ve.jsonl"
    source.write_text('{"image": "a.jpg", "sentence": "x", "label": "neutral"}\n\n{"image": "a.j\n')
    rows, bad = commit(source, tmp_path / "out")
    assert len(rows) == 1
    assert bad == [("malformed record", "ve.jsonl, line 3")]


# NLVR2.


def test_nlvr2_lines_find_the_pictures_of_the_official_download(tmp_path):
    names = ("dev-850-0-img0.png", "dev-850-0-img1.png", "images/train/46/train-1-2-img0.png")
    write_pictures(tmp_path, *names, "images/train/46/train-1-2-img1.png")
    entries = [
        {
            "identifier": "dev-850-0-1",
            "sentence": "two bottles",
            "label": "False",
            "left_url": "http://x/0.png",
            "right_url": "http://x/1.png",
        },
        {"identifier": "train-1-2-0", "sentence": "a dog", "label": "True", "directory": 46},
        {"identifier": "dev-850-9-0", "sentence": "gone", "label": "True"},
        {"identifier": "odd", "sentence": "gone", "label": "True"},
    ]
    # The official files are one entry a line and yet named .json.
    rows, bad = commit(write_lines(tmp_path / "dev.json", entries), tmp_path / "out")
    assert told(rows) == {
        "nlvr2:dev-850-0-img0": {},
        "nlvr2:dev-850-0-img1": {
            "pairs": [
                {
                    "left": "nlvr2:dev-850-0-img0",
                    "sentence": "two bottles",
                    "label": False,
                    "id": "dev-850-0-1",
                }
            ]
        },
        "nlvr2:train-1-2-img0": {},
        "nlvr2:train-1-2-img1": {
            "pairs": [
                {
                    "left": "nlvr2:train-1-2-img0",
                    "sentence": "a dog",
                    "label": True,
                    "id": "train-1-2-0",
                }
            ]
        },
    }
    assert [(row["url"], row["split"]) for row in rows][:2] == [
        ("http://x/0.png", "dev"),
        ("http://x/1.png", "dev"),
    ]
    assert bad == [
        ("malformed record", "dev.json, line 4"),
        ("missing picture", "nlvr2:dev-850-9-img0"),
        ("missing picture", "nlvr2:dev-850-9-img1"),
    ]
