"""The answer decoder against one-answer-at-a-time NumPy layers; what a token may see."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from albef_core.answer_decoder import AnswerDecoder
from albef_core.config import ModelConfig
from albef_core.keyed import Stream, row_keys
from tests.albef_core import literal
from tests.albef_core.tasks.questions import make_questions, random_vqa

# Both sides compute in float64; the norms' epsilon is 1e-12, and sums differ in their order.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return replace(tiny_config, fusion_layers=2)


@pytest.fixture
def decoder(config: ModelConfig) -> AnswerDecoder:
    return random_vqa(config).answer_decoder.double()


@pytest.fixture
def inputs(config: ModelConfig) -> dict[str, Tensor]:
    """Three answers of three to five tokens, beside questions of their own."""
    batch = make_questions(config, [1, 1, 1])
    generator = torch.Generator().manual_seed(3)
    length = batch.question_ids.shape[1]
    return {
        "answer_ids": batch.answer_ids,
        "answer_mask": batch.answer_mask,
        "question_tokens": torch.randn(3, length, config.text_width, generator=generator).double(),
        "question_mask": batch.question_mask,
    }


def test_the_decoder_equals_its_equations(
    decoder: AnswerDecoder, config: ModelConfig, inputs: dict[str, Tensor]
) -> None:
    found = decoder(**inputs).detach().numpy()
    weights = {name: value.detach().numpy() for name, value in decoder.named_parameters()}
    for row, mask in enumerate(inputs["answer_mask"]):
        answer = inputs["answer_ids"][row][mask].tolist()
        tokens = np.stack(
            [
                weights["word_embeddings.weight"][token_id]
                + weights["position_embeddings.weight"][place]
                + weights["type_embeddings.weight"][0]
                for place, token_id in enumerate(answer)
            ]
        )
        tokens = literal.layer_norm(tokens, weights, "norm")
        for n in range(config.fusion_layers):
            own = {
                name.removeprefix(f"layers.{n}."): value
                for name, value in weights.items()
                if name.startswith(f"layers.{n}.")
            }
            tokens = literal.decoder_layer(
                tokens,
                inputs["question_tokens"][row].numpy(),
                inputs["question_mask"][row].tolist(),
                own,
                num_heads=config.text_heads,
            )
        np.testing.assert_allclose(found[row, : len(answer)], tokens, **EXACT)


def test_no_token_sees_what_comes_after_it(
    decoder: AnswerDecoder, inputs: dict[str, Tensor]
) -> None:
    ids = inputs["answer_ids"]
    for place in range(1, ids.shape[1]):
        other = torch.where(torch.arange(ids.shape[1]) < place, ids, 9)
        moved = decoder(**(inputs | {"answer_ids": other}))
        torch.testing.assert_close(moved[:, :place], decoder(**inputs)[:, :place])
        assert not torch.equal(moved[:, place], decoder(**inputs)[:, place])


def test_padding_of_answer_and_question_reaches_no_token(
    decoder: AnswerDecoder, inputs: dict[str, Tensor]
) -> None:
    kept, seen = inputs["answer_mask"], inputs["question_mask"]
    scrambled = inputs | {
        "answer_ids": torch.where(kept, inputs["answer_ids"], 9),
        "question_tokens": torch.where(seen[..., None], inputs["question_tokens"], 7.0),
    }
    assert not torch.equal(scrambled["question_tokens"], inputs["question_tokens"])
    torch.testing.assert_close(decoder(**scrambled)[kept], decoder(**inputs)[kept])


def test_keyed_dropout_is_the_same_in_any_company(
    config: ModelConfig, inputs: dict[str, Tensor]
) -> None:
    decoder = random_vqa(replace(config, dropout=0.5)).answer_decoder.double()
    keys = row_keys(torch.arange(3), seed=7, stream=Stream.ANSWER)
    together = decoder(**inputs, keys=keys)
    alone = torch.cat(
        [
            decoder(**{name: rows[row : row + 1] for name, rows in inputs.items()}, keys=key[None])
            for row, key in enumerate(keys)
        ]
    )
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, decoder.eval()(**inputs))


def test_fresh_weights_are_drawn_as_bert_draws_them_at_its_width(config: ModelConfig) -> None:
    torch.manual_seed(0)
    decoder = AnswerDecoder(replace(config, text_width=64, text_mlp_width=256, vocab_size=500))
    for name, parameter in decoder.named_parameters():
        is_norm = name.split(".")[-2] == "norm"
        if parameter.ndim == 1:
            assert (parameter == float(is_norm and name.endswith("weight"))).all(), name
        elif parameter.numel() > 1000:
            # Five standard errors of the deviation of a thousand numbers.
            deviation = 0.02 * math.sqrt(768 / 64)
            assert parameter.std().item() == pytest.approx(deviation, rel=0.12), name
