"""Fine-tuned models from Python: pictures and texts in, answers and probabilities out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.task_api import FineTuned
from albef_core.tasks.folder import MODELS, save_task
from albef_core.tasks.predict import Answering
from albef_core.tokenizer import Tokenizer

ANSWERS = ("red", "blue", "two squares")
WORDS = ["a red square left of two blue squares", "is it so?"]


@pytest.fixture
def make_tuned(tmp_path: Path, tiny_config: ModelConfig):
    """Give a function that makes a model of a task, with random weights."""

    def make(task: str, *, batch_size: int = 32) -> FineTuned:
        tokenizer = Tokenizer.learn(WORDS, vocab_size=tiny_config.vocab_size)
        torch.manual_seed(3)
        save_task(
            tmp_path / task,
            MODELS[task](tiny_config),
            task=task,
            model_config=tiny_config,
            text_config=TextConfig(tokenizer="corpus", max_words=8, max_tokens=10),
            recipe=Recipe(),
            tokenizer=tokenizer,
            answers=ANSWERS if task == "vqa" else (),
        )
        return FineTuned.load(tmp_path / task, batch_size=batch_size)

    return make


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(5)]


TEXTS = ["a red square", "two squares", "is it blue", "left of", "a square"]


def test_entailment_gives_three_probabilities_a_pair(make_tuned, pictures) -> None:
    said = make_tuned("entailment").entail(pictures, TEXTS)
    assert said.shape == (5, 3)
    np.testing.assert_allclose(said.sum(axis=1), 1, rtol=1e-5)


def test_the_batch_size_changes_nothing_but_rounding(make_tuned, pictures) -> None:
    whole = make_tuned("entailment").entail(pictures, TEXTS)
    parts = make_tuned("entailment", batch_size=2).entail(pictures, TEXTS)
    np.testing.assert_allclose(whole, parts, rtol=1e-4)


def test_a_statement_on_two_pictures_depends_on_which_is_left(make_tuned, pictures) -> None:
    tuned = make_tuned("nlvr2")
    said = tuned.verify(pictures, pictures[::-1], TEXTS)
    assert said.shape == (5,)
    assert not np.allclose(said, tuned.verify(pictures[::-1], pictures, TEXTS))


def test_questions_are_answered_from_the_list_or_freely(make_tuned, pictures, tmp_path) -> None:
    tuned = make_tuned("vqa")
    Image.fromarray(pictures[0]).save(tmp_path / "one.png")
    from_file = tuned.answer([tmp_path / "one.png"], TEXTS[:1])
    from_array = tuned.answer(pictures[:1], TEXTS[:1])
    assert from_file.candidates == from_array.candidates
    assert sorted(from_file.candidates[0]) == sorted(ANSWERS)
    assert from_file.answers == [from_file.candidates[0][0]]
    free = tuned.answer(pictures, TEXTS, answering=Answering(is_open=True, num_beams=2))
    assert len(free.answers) == 5


def test_what_does_not_fit_is_one_line(make_tuned, pictures) -> None:
    tuned = make_tuned("vqa")
    with pytest.raises(InputError, match="fine-tuned for vqa, not for entailment"):
        tuned.entail(pictures, TEXTS)
    with pytest.raises(InputError, match=r"lists of \[5, 4\] items"):
        tuned.answer(pictures, TEXTS[:4])
    with pytest.raises(InputError, match="come in lists"):
        tuned.answer(pictures, "what is it?")
