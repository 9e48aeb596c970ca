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
from albef_core.teacher import frozen_copy
from albef_core.tokenizer import Tokenizer
from albef_core.weights import save_official

ANSWERS = ("red", "blue", "two squares")
WORDS = ["a red square left of two blue squares", "is it so?"]


@pytest.fixture
def make_tuned(tmp_path: Path, tiny_config: ModelConfig):
    """Give a function that makes a model of a task, with random weights."""

    def make(
        task: str,
        *,
        batch_size: int = 32,
        config: ModelConfig = tiny_config,
        recipe: Recipe = Recipe(),  # noqa: B008  # frozen
    ) -> FineTuned:
        tokenizer = Tokenizer.learn(WORDS, vocab_size=config.vocab_size)
        torch.manual_seed(3)
        save_task(
            tmp_path / task,
            MODELS[task](config),
            task=task,
            model_config=config,
            text_config=TextConfig(tokenizer="corpus", max_words=8, max_tokens=10),
            recipe=recipe,
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


def test_an_official_file_answers_as_the_folder_does_with_the_same_list(
    make_tuned, pictures, tmp_path, head_wide_config: ModelConfig
) -> None:
    tuned = make_tuned("vqa", config=head_wide_config, recipe=Recipe(keep_sep=False))
    model = tuned.loaded.model
    file = tmp_path / "vqa.pth"
    save_official(file, model, frozen_copy(model), None, tuned.loaded.model_config)
    tuned.loaded.tokenizer.save(tmp_path)
    again = FineTuned.load(file, answers=ANSWERS)
    np.testing.assert_array_equal(
        again.answer(pictures, TEXTS).probabilities, tuned.answer(pictures, TEXTS).probabilities
    )
    bare = FineTuned.load(file)
    with pytest.raises(InputError, match=r"without a list of answers.*answers=\[\.\.\.\]"):
        bare.answer(pictures, TEXTS)
    assert len(bare.answer(pictures, TEXTS, answering=Answering(is_open=True)).answers) == 5
    with pytest.raises(InputError, match="answer 2, 'Red', is answer 1 again"):
        FineTuned.load(file, answers=["red", "Red"])


def test_what_does_not_fit_is_one_line(make_tuned, pictures) -> None:
    tuned = make_tuned("vqa")
    with pytest.raises(InputError, match="fine-tuned for vqa, not for entailment"):
        tuned.entail(pictures, TEXTS)
    with pytest.raises(InputError, match=r"lists of \[5, 4\] items"):
        tuned.answer(pictures, TEXTS[:4])
    with pytest.raises(InputError, match="come in lists"):
        tuned.answer(pictures, "what is it?")
