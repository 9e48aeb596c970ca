import dataclasses
import math
from typing import Any

import pytest
import torch

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.model import ALBEF, MAX_TEMPERATURE, MIN_TEMPERATURE
from albef_core.teacher import Teacher
from tests.albef_core.replay import read_json
from tests.golden_folder import GOLDEN, needs_golden

# float32 on both sides; matrix products of another number of rows round otherwise.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@needs_golden
def test_the_paper_sizes_have_the_official_number_of_parameters() -> None:
    recorded = read_json(GOLDEN / "full_size" / "models.json")["pretrain"]
    with torch.device("meta"):
        model = ALBEF(ModelConfig())
        teacher = Teacher(ModelConfig(), model)
    assert count(model) == recorded["parameters_trainable"]
    assert count(model) + count(teacher) == recorded["parameters_unique"]


def test_features_are_unit_vectors_of_the_joint_size(
    tiny_model: ALBEF, tiny_config: ModelConfig, pairs: PairBatch
) -> None:
    _, image_features = tiny_model.encode_image(pairs.images)
    _, text_features = tiny_model.encode_text(pairs.token_ids, pairs.attention_mask)
    for features in (image_features, text_features):
        assert features.shape == (len(pairs), tiny_config.feature_size)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(pairs)))


def test_a_feature_is_the_projection_of_the_first_token(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    tokens, features = tiny_model.encode_image(pairs.images)
    projected = tiny_model.image_projection(tokens[:, 0])
    torch.testing.assert_close(features * projected.norm(dim=1, keepdim=True), projected)
    tokens, features = tiny_model.encode_text(pairs.token_ids, pairs.attention_mask)
    projected = tiny_model.text_projection(tokens[:, 0])
    torch.testing.assert_close(features * projected.norm(dim=1, keepdim=True), projected)


def test_a_pair_is_encoded_alike_whatever_lies_beside_it(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    order = torch.tensor([2, 0, 3, 1])
    _, images = tiny_model.encode_image(pairs.images)
    _, texts = tiny_model.encode_text(pairs.token_ids, pairs.attention_mask)
    _, shuffled_images = tiny_model.encode_image(pairs.images[order])
    _, shuffled_texts = tiny_model.encode_text(pairs.token_ids[order], pairs.attention_mask[order])
    torch.testing.assert_close(shuffled_images, images[order], **CLOSE)
    torch.testing.assert_close(shuffled_texts, texts[order], **CLOSE)


def test_each_caption_looks_at_the_image_in_its_own_row(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    images, _ = tiny_model.encode_image(pairs.images)
    texts, _ = tiny_model.encode_text(pairs.token_ids, pairs.attention_mask)
    fused = tiny_model.fuse(texts, pairs.attention_mask, images)
    changed = images.clone()
    changed[2] += torch.linspace(0, 1, changed.shape[-1])
    moved = tiny_model.fuse(texts, pairs.attention_mask, changed) - fused
    assert moved.abs().amax(dim=(1, 2)).gt(1e-3).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("before", "after"),
    [(-1.0, MIN_TEMPERATURE), (0.0, MIN_TEMPERATURE), (0.07, 0.07), (3.0, MAX_TEMPERATURE)],
)
def test_temperature_is_clamped_in_place(tiny_model: ALBEF, before: float, after: float) -> None:
    torch.nn.init.constant_(tiny_model.temperature, before)
    parameter = tiny_model.temperature
    tiny_model.clamp_temperature()
    assert tiny_model.temperature is parameter
    assert parameter.item() == pytest.approx(after)


def test_temperature_starts_where_it_is_told(tiny_config: ModelConfig) -> None:
    assert ALBEF(tiny_config).temperature.item() == pytest.approx(0.07)
    assert ALBEF(tiny_config, temperature=0.2).temperature.item() == pytest.approx(0.2)


def test_the_mlm_decoder_is_the_word_embedding(tiny_model: ALBEF) -> None:
    assert tiny_model.mlm_head.decoder.weight is tiny_model.text_encoder.word_embeddings.weight


@pytest.mark.parametrize("width", [768, 48])
def test_a_random_image_encoder_is_as_strong_at_any_width(
    tiny_config: ModelConfig, width: int
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_config, image_width=width, image_heads=4)
    block = ALBEF(config).get_parameter("image_encoder.blocks.0.attn.qkv.weight")
    assert block.std().item() == pytest.approx(0.02 * math.sqrt(768 / width), rel=0.1)
