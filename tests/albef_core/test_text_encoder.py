"""BERT's two halves, against one-caption-at-a-time NumPy layers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.text_encoder import MlmHead, MultimodalEncoder, TextEncoder
from tests.albef_core import literal

# Both sides compute in float64; the norms' epsilon is 1e-12, and sums differ in their order.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def test_text_encoder_equals_its_equations(
    tiny_model: ALBEF, tiny_config: ModelConfig, pairs: PairBatch
) -> None:
    encoder = tiny_model.text_encoder.double()
    tokens = encoder(pairs.token_ids, pairs.attention_mask).detach().numpy()
    weights, heads = arrays(encoder), tiny_config.text_heads
    for row, token_ids in enumerate(pairs.token_ids.numpy()):
        visible = pairs.attention_mask[row].tolist()
        expected = np.stack(
            [
                weights["word_embeddings.weight"][token_id]
                + weights["position_embeddings.weight"][place]
                + weights["type_embeddings.weight"][0]
                for place, token_id in enumerate(token_ids)
            ]
        )
        expected = literal.layer_norm(expected, weights, "norm")
        for layer in encoder.layers:
            expected = literal.text_layer(expected, visible, None, arrays(layer), num_heads=heads)
        np.testing.assert_allclose(tokens[row], expected, **EXACT)


def test_multimodal_encoder_equals_its_equations(
    tiny_model: ALBEF, tiny_config: ModelConfig, pairs: PairBatch
) -> None:
    model = tiny_model.double()
    image_tokens, _ = model.encode_image(pairs.images.double())
    text_tokens, _ = model.encode_text(pairs.token_ids, pairs.attention_mask)
    fused = model.fuse(text_tokens, pairs.attention_mask, image_tokens).detach().numpy()
    for row in range(len(pairs)):
        expected = text_tokens[row].detach().numpy()
        for layer in model.multimodal_encoder.layers:
            expected = literal.text_layer(
                expected,
                pairs.attention_mask[row].tolist(),
                image_tokens[row].detach().numpy(),
                arrays(layer),
                num_heads=tiny_config.text_heads,
            )
        np.testing.assert_allclose(fused[row], expected, **EXACT)


def test_mlm_head_equals_its_equations_and_scores_with_the_word_embeddings(
    tiny_model: ALBEF, tiny_config: ModelConfig
) -> None:
    head = tiny_model.mlm_head.double()
    tokens = np.random.default_rng(0).normal(size=(3, tiny_config.text_width))
    weights = arrays(head)
    hidden = literal.gelu(literal.linear(tokens, weights, "transform"))
    hidden = literal.layer_norm(hidden, weights, "norm")
    words = tiny_model.text_encoder.word_embeddings.weight.detach().double().numpy()
    expected = hidden @ words.T + weights["decoder.bias"]
    np.testing.assert_allclose(head(torch.from_numpy(tokens)).detach().numpy(), expected, **EXACT)


def test_a_caption_gives_the_same_tokens_at_any_padding(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    padded_ids = torch.nn.functional.pad(pairs.token_ids, (0, 4))
    padded_mask = torch.nn.functional.pad(pairs.attention_mask, (0, 4))
    short, _ = tiny_model.encode_text(pairs.token_ids, pairs.attention_mask)
    long, _ = tiny_model.encode_text(padded_ids, padded_mask)
    kept = pairs.attention_mask
    torch.testing.assert_close(long[:, : kept.shape[1]][kept], short[kept], rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_reaches_no_token(tiny_model: ALBEF, pairs: PairBatch) -> None:
    scrambled = torch.where(pairs.attention_mask, pairs.token_ids, 9)
    assert not torch.equal(scrambled, pairs.token_ids)
    images, _ = tiny_model.encode_image(pairs.images)
    kept, fused = pairs.attention_mask, []
    for token_ids in (pairs.token_ids, scrambled):
        tokens, _ = tiny_model.encode_text(token_ids, kept)
        fused.append(tiny_model.fuse(tokens, kept, images)[kept])
    assert torch.equal(*fused)


def test_fresh_weights_are_drawn_as_bert_draws_them_at_its_width() -> None:
    torch.manual_seed(0)
    config = ModelConfig(text_width=64, text_heads=1, text_mlp_width=256, text_layers=1)
    config = replace(config, vocab_size=500, fusion_layers=1)
    text = TextEncoder(config)
    for module in (text, MultimodalEncoder(config), MlmHead(config, text.word_embeddings)):
        for name, parameter in module.named_parameters():
            is_norm = name.split(".")[-2] == "norm"
            if parameter.ndim == 1:
                expected = float(is_norm and name.endswith("weight"))
                assert (parameter == expected).all(), name
            elif parameter.numel() > 1000:
                # Five standard errors of the deviation of a thousand numbers.
                deviation = 0.02 * math.sqrt(768 / 64)
                assert parameter.std().item() == pytest.approx(deviation, rel=0.12), name
    assert (text.word_embeddings.weight[0] == 0).all()


def test_dropout_acts_in_training_only(tiny_config: ModelConfig, pairs: PairBatch) -> None:
    torch.manual_seed(0)
    model = ALBEF(replace(tiny_config, dropout=0.5))
    trained = [model.encode_text(pairs.token_ids, pairs.attention_mask)[0] for _ in range(2)]
    model.eval()
    judged = [model.encode_text(pairs.token_ids, pairs.attention_mask)[0] for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*judged)


def test_images_projected_once_give_each_of_their_captions_the_same_tokens_and_gradients(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    image_of_row = torch.tensor([1, 0, 1, 1])
    encoder, mask = tiny_model.multimodal_encoder, pairs.attention_mask
    images, _ = tiny_model.encode_image(pairs.images[1:3])
    texts, _ = tiny_model.encode_text(pairs.token_ids, mask)
    images, texts = images.detach().requires_grad_(), texts.detach()
    once = encoder.fuse(texts, mask, encoder.project(images), image_of_row)
    each = encoder(texts, mask, images[image_of_row])
    torch.testing.assert_close(once, each)
    weights = dict(encoder.named_parameters())["layers.0.cross_attention.key.weight"]
    for of_once, of_each in zip(
        torch.autograd.grad(once.square().sum(), [images, weights]),
        torch.autograd.grad(each.square().sum(), [images, weights]),
        strict=True,
    ):
        torch.testing.assert_close(of_once, of_each, rtol=1e-4, atol=1e-5)  # sums in other order
