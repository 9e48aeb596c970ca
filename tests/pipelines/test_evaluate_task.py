"""How answers are scored, and by what they are told apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.tasks.folder import LoadedTask
from albef_core.tokenizer import Tokenizer
from pipelines.evaluate_task import _score, _slices_of, closed_answers
from pipelines.evaluation_config import EvaluateTaskConfig
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


@pytest.fixture
def official_vqa() -> LoadedTask:
    """A model as an official file gives it: without a list of answers."""
    return LoadedTask(
        task="vqa",
        model=nn.Identity(),
        model_config=ModelConfig(),
        text_config=TextConfig(),
        recipe=Recipe(),
        tokenizer=Tokenizer.learn(["red"], vocab_size=30),
        answers=(),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('["red", "blue", "Red "]', r"list\.json: answer 3, 'Red ', is answer 1 again\. Keep one"),
        ('["red", ""]', r"list\.json: answer 2 is empty\. Take it out"),
        ('{"red": 1}', r"list\.json: expected is a JSON list of answers"),
        ("red", r"list\.json: not JSON"),
    ],
)
def test_a_list_of_answers_that_cannot_be_one_is_refused(
    text: str, sentence: str, official_vqa: LoadedTask, tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text(text)
    config = EvaluateTaskConfig(
        model="vqa.pth", corpus=tmp_path, answer_list=tmp_path / "list.json"
    )
    with pytest.raises(InputError, match=sentence):
        closed_answers(config, official_vqa)


def test_an_official_file_asks_for_a_list_unless_answers_are_written_freely(
    official_vqa: LoadedTask, tmp_path: Path
) -> None:
    config = EvaluateTaskConfig(model="vqa.pth", corpus=tmp_path)
    with pytest.raises(InputError, match=r"--model vqa\.pth: .* Pass --answer-list FILE\.json"):
        closed_answers(config, official_vqa)
    assert closed_answers(replace(config, answers="open"), official_vqa) == ()


def test_slices_are_by_length_and_kind() -> None:
    assert _slices_of("number", "how many are there here") == ("short text", "number")
    assert _slices_of("", " ".join(["word"] * 11)) == ("long text",)
