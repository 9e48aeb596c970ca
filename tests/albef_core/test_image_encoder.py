from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.image_encoder import ImageEncoder, resize_position_embeddings
from albef_core.model import ALBEF
from tests.albef_core.replay import read_json
from tests.golden_folder import GOLDEN, needs_golden

FOLDER = GOLDEN / "vit_pos_embed"


@needs_golden
def test_position_embeddings_are_interpolated_as_recorded() -> None:
    tensors, cases = load_file(FOLDER / "tensors.safetensors"), read_json(FOLDER / "cases.json")
    for case in cases:
        old, new = case["from_grid"], case["to_grid"]
        name = f"{old}x{old}_to_{new}x{new}"
        resized = resize_position_embeddings(tensors[f"in_{name}"], num_patches=new * new)
        # float32 on both sides; another release of torch may sum the 16 neighbors in another order.
        torch.testing.assert_close(resized, tensors[f"out_{name}"], rtol=1e-6, atol=1e-6, msg=name)
    assert cases


def test_a_resized_grid_keeps_the_class_token_and_a_constant() -> None:
    embeddings = torch.cat([torch.full((1, 1, 3), 7.0), torch.full((1, 9, 3), 2.0)], dim=1)
    resized = resize_position_embeddings(embeddings, num_patches=25)
    expected = torch.cat([torch.full((1, 1, 3), 7.0), torch.full((1, 25, 3), 2.0)], dim=1)
    torch.testing.assert_close(resized, expected)


def test_a_grid_of_the_right_size_passes_bit_by_bit() -> None:
    embeddings = torch.randn(1, 17, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_position_embeddings(embeddings, num_patches=16), embeddings)


def test_it_is_timms_vision_transformer_under_the_same_names(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, image_layers=2)
    timms = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.image_width,
        depth=config.image_layers,
        num_heads=config.image_heads,
        mlp_ratio=config.image_mlp_ratio,
        num_classes=0,
    )
    ours = ImageEncoder(config)
    ours.load_state_dict(timms.state_dict())
    images = torch.randn(2, 3, *2 * [config.image_size])
    found, expected = ours(images), timms.forward_features(images)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours_part), timms_part in zip(
        ours.named_parameters(), timms.parameters(), strict=True
    ):
        torch.testing.assert_close(ours_part.grad, timms_part.grad, msg=name)


def test_a_picture_that_patches_do_not_divide_is_refused(tiny_model: ALBEF) -> None:
    patch = tiny_model.image_encoder.patch_embed.patch_size
    with pytest.raises(InputError, match=rf"{patch + 1} px cannot be cut into patches of {patch}"):
        tiny_model.image_encoder(torch.zeros(1, 3, patch + 1, patch + 1))


@pytest.mark.parametrize("size", [8, 16, 40])
def test_a_picture_of_any_resolution_gives_a_class_token_and_its_patches(
    tiny_model: ALBEF, tiny_config: ModelConfig, size: int
) -> None:
    tokens = tiny_model.image_encoder(torch.zeros(2, 3, size, size))
    num_patches = (size // tiny_config.patch_size) ** 2
    assert tokens.shape == (2, 1 + num_patches, tiny_config.image_width)


def test_another_resolution_equals_a_model_built_for_it_with_resized_positions(
    tiny_config: ModelConfig, tiny_model: ALBEF, make_model: Callable[..., ALBEF]
) -> None:
    ours = tiny_model.image_encoder
    larger = make_model(replace(tiny_config, image_size=24)).image_encoder
    state = dict(ours.state_dict())
    state["pos_embed"] = resize_position_embeddings(ours.pos_embed, num_patches=9)
    larger.load_state_dict(state)
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), larger(images))


def test_positions_tell_equal_patches_apart(tiny_model: ALBEF) -> None:
    tokens = tiny_model.image_encoder(torch.zeros(1, 3, 16, 16))[0, 1:]
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 0.01


def test_patches_are_read_row_by_row() -> None:
    config = ModelConfig(
        image_size=4, patch_size=2, image_width=2, image_heads=1, image_layers=1, text_layers=1
    )
    encoder = ImageEncoder(config)
    encoder.patch_embed.load_state_dict(
        {"proj.weight": torch.ones(2, 3, 2, 2), "proj.bias": torch.zeros(2)}
    )
    images = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    patches = encoder.patch_embed(images)[0, :, 0]
    assert patches.tolist() == [3 * (0 + 1 + 4 + 5), 3 * 18, 3 * 42, 3 * 50]
