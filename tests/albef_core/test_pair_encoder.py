"""The pair encoder looks at two images in turn; a pair shares what it reads off an image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.pair_encoder import PairEncoder, in_pairs
from albef_core.text_encoder import MultimodalEncoder
from tests.albef_core import literal

SHARED = ("cross_attention.key", "cross_attention.value")


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return replace(tiny_config, fusion_layers=2)


@pytest.fixture
def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[True, True, True], [True, True, False]])
    images = draw(2, 5, config.image_width), draw(2, 5, config.image_width)
    return draw(2, 3, config.text_width), mask, *images


@pytest.fixture
def encoder(config: ModelConfig) -> PairEncoder:
    generator = torch.Generator().manual_seed(1)
    made = PairEncoder(config).double()
    for parameter in made.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.3 * noise)
    return made


def test_the_pair_encoder_equals_its_layers_written_out(
    config: ModelConfig, encoder: PairEncoder, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    found = encoder(*inputs).detach().numpy()
    text, mask, *images = (part.numpy() for part in inputs)
    for row in range(len(text)):
        tokens = text[row]
        for number, layer in enumerate(encoder.layers):
            weights = {name: value.numpy() for name, value in layer.state_dict().items()}
            looked_at = images[number % 2][row]
            tokens = literal.text_layer(
                tokens, mask[row].tolist(), looked_at, weights, num_heads=config.text_heads
            )
        np.testing.assert_allclose(found[row], tokens, rtol=1e-9, atol=1e-9)


def test_a_pair_shares_key_and_value_projections_and_nothing_else(encoder: PairEncoder) -> None:
    for first, second in zip(encoder.layers[::2], encoder.layers[1::2], strict=True):
        theirs = dict(second.named_parameters())
        for name, parameter in first.named_parameters():
            assert (parameter is theirs[name]) == name.startswith(SHARED), name
    of_other_pair = {id(parameter) for parameter in encoder.layers[2].parameters()}
    assert not any(id(parameter) in of_other_pair for parameter in encoder.layers[1].parameters())


def test_the_state_dict_has_what_is_shared_under_both_names(encoder: PairEncoder) -> None:
    state = encoder.state_dict()
    num_parameters = sum(1 for _ in encoder.parameters())
    assert len(state) == num_parameters + 2 * len(SHARED) * len(encoder.layers) // 2
    key = "cross_attention.key.weight"
    assert state[f"layers.0.{key}"].data_ptr() == state[f"layers.1.{key}"].data_ptr()


def test_a_pre_trained_layer_becomes_both_layers_of_a_pair(
    config: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    pretrained = ALBEF(config).state_dict()
    paired = in_pairs(pretrained)
    prefix = "multimodal_encoder."
    encoder = PairEncoder(config)
    own = {name.removeprefix(prefix): v for name, v in paired.items() if name.startswith(prefix)}
    encoder.load_state_dict(own)
    for name, value in encoder.state_dict().items():
        _, number, part = name.split(".", 2)
        source = pretrained[f"{prefix}layers.{int(number) // 2}.{part}"]
        assert torch.equal(value, source), name
    others = {name for name in pretrained if not name.startswith(prefix)}
    assert others == {name for name in paired if not name.startswith(prefix)}


def test_each_text_sees_both_images_and_their_order(
    encoder: PairEncoder, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    text, mask, first, second = inputs
    both = encoder(text, mask, first, second)
    assert (both - encoder(text, mask, second, first)).abs().max() > 1e-3
    assert (both - encoder(text, mask, first, first)).abs().max() > 1e-3
    assert (both - encoder(text, mask, second, second)).abs().max() > 1e-3


def test_one_image_twice_equals_a_plain_encoder_of_the_same_layers(
    config: ModelConfig, encoder: PairEncoder, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    text, mask, image, _ = inputs
    plain = MultimodalEncoder(replace(config, fusion_layers=2 * config.fusion_layers)).double()
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(text, mask, image, image), plain(text, mask, image))
