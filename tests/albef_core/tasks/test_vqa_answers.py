"""Ranking equals reading every answer; beam search equals trying every answer."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from albef_core.config import ModelConfig, corrected, paper_2021
from albef_core.errors import InputError
from albef_core.tasks.vqa import VqaModel
from albef_core.tasks.vqa_answers import (
    GeneratedAnswers,
    RankedAnswers,
    check_answers,
    generate_answers,
    rank_answers,
)
from tests.albef_core.tasks.questions import CLS, SEP, make_questions, padded, random_vqa

# Sums of float64 logarithms in another order, or in a batch of another size.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
NUM_QUESTIONS = 3

Questions = tuple[Tensor, Tensor, Tensor]
"""Images, token ids, mask."""

# Answers 0, 2 and 5 begin alike; 2 goes on from 0.
LIST = [[CLS, 7, SEP], [CLS, 9, 4, SEP], [CLS, 7, 8, SEP], [CLS, 5, SEP], [CLS, 12, 6, 3, SEP]]
LIST += [[CLS, 7, 20, SEP]]


@pytest.fixture
def model(tiny_config: ModelConfig) -> VqaModel:
    return random_vqa(tiny_config).double().eval()


@pytest.fixture
def questions(tiny_config: ModelConfig) -> Questions:
    batch = make_questions(tiny_config, [1] * NUM_QUESTIONS)
    return batch.images.double(), batch.question_ids, batch.question_mask


class Reader:
    """Reads beginnings of answers one at a time, beside one question at a time."""

    def __init__(self, model: VqaModel, questions: Questions) -> None:
        self.model, self.known = model, {}
        self.questions = [one_question(questions, row) for row in range(NUM_QUESTIONS)]
        with torch.inference_mode():
            self.tokens = [model.encode_question(*question) for question in self.questions]

    def next_tokens(self, row: int, begun: Sequence[int]) -> list[float]:
        """Give the log-probability of every token after a beginning."""
        place = row, tuple(begun)
        if place not in self.known:
            ids = torch.tensor([begun])
            with torch.inference_mode():
                beside = self.tokens[row], self.questions[row][2]
                read = self.model.decode(ids, ids >= 0, *beside)
                logits = self.model.answer_head(read[0, -1])
                self.known[place] = logits.log_softmax(dim=0).tolist()
        return self.known[place]

    def likelihoods(self, row: int, answer: Sequence[int]) -> list[float]:
        """Give the log-probability of each token of an answer."""
        places = range(1, len(answer))
        return [self.next_tokens(row, answer[:place])[answer[place]] for place in places]


def one_question(questions: Questions, row: int) -> Questions:
    image, ids, mask = (rows[row : row + 1] for rows in questions)
    length = int(mask.sum())
    return image, ids[:, :length], mask[:, :length]


def rank(model: VqaModel, questions: Questions, **options: Any) -> RankedAnswers:
    options = {"top_k": len(LIST), "recipe": corrected()} | options
    return rank_answers(model, *questions, *padded(LIST), **options)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_the_ranking_of_all_is_that_of_their_likelihoods(
    model: VqaModel, questions: Questions, batch_size: int
) -> None:
    found, reader = rank(model, questions, batch_size=batch_size), Reader(model, questions)
    for row in range(NUM_QUESTIONS):
        slow = torch.tensor([sum(reader.likelihoods(row, answer)) for answer in LIST])
        assert found.answers[row].tolist() == slow.argsort(descending=True).tolist()
        expected = slow[found.answers[row]].double()
        torch.testing.assert_close(found.log_likelihoods[row], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.scores[row], found.log_likelihoods[row])
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(NUM_QUESTIONS).double())


def test_as_published_the_first_token_counts_twice(model: VqaModel, questions: Questions) -> None:
    found, reader = rank(model, questions, recipe=paper_2021()), Reader(model, questions)
    for row in range(NUM_QUESTIONS):
        for answer, score, log_likelihood in zip(
            found.answers[row].tolist(),
            found.scores[row].tolist(),
            found.log_likelihoods[row].tolist(),
            strict=True,
        ):
            tokens = reader.likelihoods(row, LIST[answer])
            assert log_likelihood == pytest.approx(sum(tokens))
            assert score == pytest.approx(sum(tokens) + tokens[0])
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_the_candidates_are_the_likeliest_to_begin_so_and_the_earlier_of_equals(
    model: VqaModel, questions: Questions, top_k: int
) -> None:
    found = rank(model, questions, top_k=top_k)
    whole, reader = rank(model, questions), Reader(model, questions)
    for row in range(NUM_QUESTIONS):
        first = {n: reader.likelihoods(row, answer[:2]) for n, answer in enumerate(LIST)}
        # Rounded, because those that begin alike are equal only up to that here.
        by_first = sorted(first, key=lambda n: (-round(first[n][0], 9), n))
        expected = [n for n in whole.answers[row].tolist() if n in by_first[:top_k]]
        assert found.answers[row].tolist() == expected


def test_more_candidates_than_answers_are_all_answers(
    model: VqaModel, questions: Questions
) -> None:
    found, whole = rank(model, questions, top_k=100), rank(model, questions)
    assert torch.equal(found.answers, whole.answers)


def test_one_question_is_ranked_as_in_company(model: VqaModel, questions: Questions) -> None:
    alone = rank(model, one_question(questions, 1))
    together = rank(model, questions)
    assert torch.equal(alone.answers[0], together.answers[1])
    torch.testing.assert_close(alone.scores[0], together.scores[1], **EXACT)


VOCABULARY = 5
"""[PAD], [CLS], [SEP] and two more: any of them may be written."""


def peaked(config: ModelConfig, seed: int) -> VqaModel:
    """A model of five word pieces that prefers some answers clearly, and [SEP] after a while."""
    return random_vqa(replace(config, vocab_size=VOCABULARY), seed=seed, scale=0.8).double().eval()


def few_questions(config: ModelConfig) -> Questions:
    batch = make_questions(replace(config, vocab_size=VOCABULARY), [1] * NUM_QUESTIONS)
    return batch.images.double(), batch.question_ids, batch.question_mask


def generate(model: VqaModel, questions: Questions, **options: Any) -> GeneratedAnswers:
    return generate_answers(model, *questions, cls_id=CLS, sep_id=SEP, **options)


def answer_of(found: GeneratedAnswers, row: int) -> list[int]:
    return found.token_ids[row][found.attention_mask[row]].tolist()


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_beams_enough_the_answer_is_the_likeliest_of_all(
    tiny_config: ModelConfig, seed: int, max_tokens: int
) -> None:
    model, questions = peaked(tiny_config, seed), few_questions(tiny_config)
    found = generate(model, questions, num_beams=VOCABULARY**max_tokens, max_tokens=max_tokens)
    reader = Reader(model, questions)
    others = [token for token in range(VOCABULARY) if token != SEP]
    every = [words for num in range(max_tokens + 1) for words in product(others, repeat=num)]
    for row in range(NUM_QUESTIONS):
        scores = {words: sum(reader.likelihoods(row, [CLS, *words, SEP])) for words in every}
        best = max(scores, key=scores.__getitem__)
        assert answer_of(found, row) == list(best)
        assert found.log_likelihoods[row].item() == pytest.approx(scores[best])


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(tiny_config: ModelConfig, seed: int) -> None:
    model, questions = peaked(tiny_config, seed), few_questions(tiny_config)
    max_tokens = 4
    found, reader = generate(model, questions, max_tokens=max_tokens), Reader(model, questions)
    for row in range(NUM_QUESTIONS):
        answer = [CLS]
        while len(answer) <= max_tokens and answer[-1] != SEP:
            choices = reader.next_tokens(row, answer)
            answer.append(choices.index(max(choices)))
        words = [token for token in answer[1:] if token != SEP]
        assert answer_of(found, row) == words
        score = sum(reader.likelihoods(row, [CLS, *words, SEP]))
        assert found.log_likelihoods[row].item() == pytest.approx(score)


def slow_beams(
    reader: Reader, row: int, *, num_beams: int, max_tokens: int
) -> tuple[list[int], float]:
    """Beam search over lists of words, one beginning at a time."""
    beams: list[tuple[tuple[int, ...], float]] = [((CLS,), 0.0)]
    for place in range(max_tokens + 1):
        heirs = [beam for beam in beams if beam[0][-1] == SEP]
        for words, score in beams:
            tokens = [SEP] if place == max_tokens else range(VOCABULARY)
            if words[-1] != SEP:
                steps = reader.next_tokens(row, words)
                heirs += [((*words, token), score + steps[token]) for token in tokens]
        beams = sorted(heirs, key=lambda heir: -heir[1])[:num_beams]
    words, score = beams[0]
    return [token for token in words[1:] if token != SEP], score


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beams_are_kept_and_dropped_as_in_a_slow_search(
    tiny_config: ModelConfig, seed: int, num_beams: int
) -> None:
    model, questions = peaked(tiny_config, seed), few_questions(tiny_config)
    found = generate(model, questions, num_beams=num_beams, max_tokens=4)
    reader = Reader(model, questions)
    for row in range(NUM_QUESTIONS):
        words, score = slow_beams(reader, row, num_beams=num_beams, max_tokens=4)
        assert answer_of(found, row) == words
        assert found.log_likelihoods[row].item() == pytest.approx(score)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_answer_is_written_alone_as_in_company(tiny_config: ModelConfig, num_beams: int) -> None:
    model, questions = peaked(tiny_config, 2), few_questions(tiny_config)
    together = generate(model, questions, num_beams=num_beams, max_tokens=5)
    for row in range(NUM_QUESTIONS):
        alone = generate(model, one_question(questions, row), num_beams=num_beams, max_tokens=5)
        assert answer_of(alone, 0) == answer_of(together, row)
        torch.testing.assert_close(alone.log_likelihoods[0], together.log_likelihoods[row], **EXACT)


def test_an_answer_ends_at_sep_and_its_padding_is_masked(tiny_config: ModelConfig) -> None:
    model, questions = peaked(tiny_config, 0), few_questions(tiny_config)
    # A head that always says [SEP] first.
    model.answer_head.decoder.bias.data.zero_()[SEP] = 1000.0
    found = generate(model, questions, max_tokens=5)
    assert found.token_ids.shape == found.attention_mask.shape == (NUM_QUESTIONS, 0)
    # A head that never says it: the longest answer, and the price of its [SEP].
    model.answer_head.decoder.bias.data[SEP] = -1000.0
    found = generate(model, questions, num_beams=2, max_tokens=5)
    assert found.attention_mask.shape == (NUM_QUESTIONS, 5)
    assert found.attention_mask.all()
    assert (found.log_likelihoods < -500).all()


def test_a_list_of_different_answers_passes() -> None:
    check_answers(["yes", "no", "2 dogs", "two dogs"], source="answers.json")


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], ["no answer"]),
        (["yes", " \t"], ["answer 2", "empty"]),
        (["yes", "no", "yes"], ["answer 3", "'yes'", "answer 1"]),
        (["a red  car", "no", " A red car\n"], ["answer 3", "answer 1"]),
    ],
)
def test_a_bad_list_is_refused_in_one_line(answers: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        check_answers(answers, source="answers.json")
    message = str(refused.value)
    assert message.startswith("answers.json: ")
    assert "\n" not in message
    assert all(word in message for word in words)
