"""How answers are scored, and by what they are told apart."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.evaluate_task import _score, _slices_of
from pipelines.examples import SCHEMA
from pipelines.task_report import Case, cases_figure


def table_of(labels: list[str], answers: list[list[str]]) -> pa.Table:
    rows = [
        {"row": n, "left": -1, "text": "t", "label": label, "answers": given, "kind": label}
        for n, (label, given) in enumerate(zip(labels, answers, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_classes_are_right_or_wrong_and_the_majority_is_the_most_frequent() -> None:
    table = table_of(["neutral", "entailment", "neutral"], [[], [], []])
    scores, majority, blind = _score("entailment", table, ["neutral", "neutral", "entailment"])
    assert scores.tolist() == [1, 0, 0]
    assert majority == "neutral"
    assert blind.tolist() == [1, 0, 1]


def test_few_annotators_make_an_answer_right_and_many_by_their_agreement() -> None:
    many = ["two"] * 2 + ["three"] * 8
    table = table_of(["", "", ""], [["book", "lamp"], ["chair"], many])
    scores, majority, _ = _score("vqa", table, ["lamp", "table", "two"])
    assert scores.tolist() == pytest.approx([1, 0, (8 * 2 / 3 + 2 * 1 / 3) / 10])
    assert majority in ("book", "chair", "three")


def test_a_case_on_two_pictures_shows_the_left_one_on_the_left() -> None:
    left, right = np.zeros((4, 6, 3), np.uint8), np.full((5, 3, 3), 255, np.uint8)
    case = Case(images=(left, right), text="two dogs", truth="true", answer="false", probability=1)
    shown = [panel.images for panel in cases_figure("worst", [case]).axes]
    assert [len(images) for images in shown] == [1, 1, 0]
    np.testing.assert_array_equal(shown[0][0].get_array(), left)
    np.testing.assert_array_equal(shown[1][0].get_array(), right)


def test_slices_are_by_length_and_kind() -> None:
    assert _slices_of("number", "how many are there here") == ("short text", "number")
    assert _slices_of("", " ".join(["word"] * 11)) == ("long text",)
