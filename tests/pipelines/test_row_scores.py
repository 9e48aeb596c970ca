from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation_config import EvaluateConfig, EvaluateTaskConfig
from pipelines.row_scores import example_rows, retrieval_rows, subject_of


def test_rows_of_a_retrieval_worked_out_by_hand():
    # Picture 0 has two texts; text 1 is given to picture 1, everything else is right.
    scores = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.7]])

    rows = retrieval_rows({"itc": (scores, scores)}, ["a", "b"], np.array([0, 0, 1]))

    assert rows["key"].to_pylist() == ["a", "b", "a 0", "a 1", "b 0"]
    assert rows["image_id"].to_pylist() == ["a", "b", "a", "a", "b"]
    # Ranks: a 0, b 1 (text 1 is above its own); a 0: 0, a 1: 1, b 0: 0.
    assert rows["itc"].to_pylist() == pytest.approx([1, 2 / 3, 1, 2 / 3, 1])


def test_examples_are_named_by_picture_and_place_in_the_corpus():
    rows = example_rows({"accuracy": np.array([1.0, 0.5])}, ["a", "a"], np.array([4, 6]))

    assert rows["key"].to_pylist() == ["a 4", "a 6"]
    assert rows["accuracy"].to_pylist() == [1.0, 0.5]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"weights")
    return tmp_path


def test_what_scores_depend_on_names_the_file_and_nothing_else_does(model: Path) -> None:
    config = EvaluateConfig(model="m", corpus=Path("c"))
    path = subject_of("retrieval", config, model=model, corpus_id="1").path

    same = replace(config, batch_size=3, actors=2, seed=9, json=Path("x"), corpus=Path("moved"))
    assert subject_of("retrieval", same, model=model, corpus_id="1").path == path

    changed = [
        subject_of("retrieval", config, model=model, corpus_id="2"),
        subject_of("retrieval", replace(config, top_k=16), model=model, corpus_id="1"),
    ]
    (model / "model.safetensors").write_bytes(b"other weights")
    changed.append(subject_of("retrieval", config, model=model, corpus_id="1"))
    assert len({path, *(subject.path for subject in changed)}) == 4


def test_a_list_of_answers_counts_by_its_content(model: Path, tmp_path: Path) -> None:
    config = EvaluateTaskConfig(model="m", corpus=Path("c"), answer_list=tmp_path / "a.json")
    (tmp_path / "a.json").write_text('["red"]')
    one = subject_of("vqa", config, model=model, corpus_id="1").path
    (tmp_path / "a.json").write_text('["blue"]')

    assert subject_of("vqa", config, model=model, corpus_id="1").path != one
