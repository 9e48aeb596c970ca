import pytest

from pipelines.annotations import clip_boxes, count_annotations, read_box, show_annotations
from pipelines.records import CLIPPED, OUTSIDE


@pytest.mark.parametrize(
    ("value", "box"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1.5, 2, 3, 4, 0.98], [1.5, 2, 3, 4]),
        ([-3, 2, 3, 4], [-3, 2, 3, 4]),
        ([1, 2, 3], None),
        ([1, 2, 0, 4], None),
        ([1, 2, 3, -4], None),
        ([1, 2, True, 4], None),
        ([1, 2, float("nan"), 4], None),
        ([float("nan"), 2, 3, 4], None),
        ([1, 2, "3", 4], None),
        ("1234", None),
        (None, None),
    ],
)
def test_a_box_is_four_numbers_that_hold_an_area(value, box):
    assert read_box(value) == box


@pytest.mark.parametrize(
    ("box", "left", "kinds"),
    [
        ([0, 0, 40, 30], [0, 0, 40, 30], []),
        ([10.5, 2.25, 29.504, 3], [10.5, 2.25, 29.504, 3], []),
        ([-4, -2, 10, 10], [0, 0, 6, 8], [CLIPPED]),
        ([35, 25, 10, 10], [35, 25, 5, 5], [CLIPPED]),
        ([40, 0, 5, 5], None, [OUTSIDE]),
        ([0, -9, 5, 5], None, [OUTSIDE]),
    ],
)
def test_boxes_are_clipped_to_the_picture_or_left_out(box, left, kinds):
    annotations = {"objects": [{"box": box, "id": 7}], "proposals": [box]}
    bad = clip_boxes(annotations, width=40, height=30, name="a:1")
    assert annotations["objects"] == ([{"box": left, "id": 7}] if left else [])
    assert annotations["proposals"] == ([left] if left else [])
    assert [(one.kind, one.name, one.is_entry) for one in bad] == [
        (kind, "a:1", True) for kind in kinds * 2
    ]


def test_an_expression_without_a_box_is_left_alone():
    annotations = {"objects": [{"expression": "the left cat"}]}
    assert clip_boxes(annotations, width=4, height=3, name="a:1") == []
    assert annotations == {"objects": [{"expression": "the left cat"}]}


def test_everything_that_is_asked_is_counted():
    annotations = {
        "questions": [
            {"question": "what?", "answers": ["cat", "cat", "dog"]},
            {"question": "how many?", "answers": ["1"]},
        ],
        "entailment": [{"sentence": "a cat", "label": "neutral"}],
        "objects": [{"box": [0, 0, 1, 1], "expression": "it"}, {"expression": "that"}],
        "proposals": [[0, 0, 1, 1]] * 3,
    }
    assert count_annotations(annotations) == {
        "questions": 2,
        "answers": 4,
        "statements": 1,
        "boxes": 1,
        "expressions": 2,
        "proposals": 3,
    }


def test_what_is_asked_is_shown_as_lines():
    annotations = {
        "questions": [{"question": "what?", "answers": ["cat", "cat", "dog"]}],
        "entailment": [{"sentence": "a cat sleeps", "label": "neutral"}],
        "pairs": [{"left": "a:0", "sentence": "two cats", "label": False}],
        "objects": [{"box": [0, 0, 1, 2], "category": "cat"}, {"expression": "that"}],
    }
    assert show_annotations(annotations) == [
        "what? cat, dog",
        "neutral: a cat sleeps",
        "with a:0: two cats (false)",
        "cat at [0, 0, 1, 2]",
        "that",
    ]
