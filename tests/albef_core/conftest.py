"""Small models and batches for the tests of the core."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.teacher import Teacher

NUM_TOKENS = 6
CLS, SEP, MASK = 1, 2, 3


@pytest.fixture
def tiny_config() -> ModelConfig:
    """Two by two patches, two heads, one layer of each kind; text and image differ in width."""
    return ModelConfig(
        image_size=16,
        patch_size=8,
        image_width=16,
        image_layers=1,
        image_heads=2,
        image_mlp_ratio=2.0,
        text_width=24,
        text_heads=2,
        text_mlp_width=32,
        text_layers=1,
        fusion_layers=1,
        vocab_size=30,
        max_positions=12,
        feature_size=8,
        dropout=0.0,
    )


@pytest.fixture
def head_wide_config(tiny_config: ModelConfig) -> ModelConfig:
    """Heads of 64, as an official checkpoint is read."""
    return replace(
        tiny_config, image_width=64, image_heads=1, text_width=128, text_heads=2, dropout=0.1
    )


@pytest.fixture
def make_model(tiny_config: ModelConfig) -> Callable[..., ALBEF]:
    """Give a function that builds a random model, of `tiny_config` or of another."""

    def make(config: ModelConfig = tiny_config, *, seed: int = 0) -> ALBEF:
        """Draw larger weights than a fresh model's, so that different inputs look different."""
        generator = torch.Generator().manual_seed(seed)
        model = ALBEF(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name != "temperature":
                center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.data.copy_(center + 0.3 * noise)
        return model

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., ALBEF]) -> ALBEF:
    return make_model()


@pytest.fixture
def tiny_teacher(
    tiny_config: ModelConfig, tiny_model: ALBEF, make_model: Callable[..., ALBEF]
) -> Teacher:
    """A teacher that lags behind `tiny_model`."""
    teacher = Teacher(tiny_config, tiny_model)
    teacher.follow(make_model(seed=1), momentum=0.9)
    return teacher


@pytest.fixture
def make_pairs(tiny_config: ModelConfig) -> Callable[..., PairBatch]:
    """Give a function that makes a batch: one photograph an id, one caption a row."""

    def make(image_ids: Sequence[int], *, masked: bool = True, seed: int = 0) -> PairBatch:
        """Captions of falling length; without `masked` no word is hidden."""
        generator = torch.Generator().manual_seed(seed)
        size, num = tiny_config.image_size, len(image_ids)
        pictures = {
            image_id: torch.randn(3, size, size, generator=generator)
            for image_id in dict.fromkeys(image_ids)
        }
        words = torch.randint(5, tiny_config.vocab_size, (num, NUM_TOKENS), generator=generator)
        lengths = torch.tensor([max(4, NUM_TOKENS - row) for row in range(num)])
        places = torch.arange(NUM_TOKENS)
        mask = places < lengths[:, None]
        token_ids = words.masked_fill(places == 0, CLS).masked_fill(~mask, 0)
        token_ids = torch.where(places == lengths[:, None] - 1, SEP, token_ids)
        hidden = (places == 1) & torch.tensor(masked)
        return PairBatch(
            images=torch.stack([pictures[image_id] for image_id in image_ids]),
            token_ids=token_ids,
            attention_mask=mask,
            masked_ids=token_ids.masked_fill(hidden, MASK),
            mlm_labels=token_ids.masked_fill(~hidden, -100),
            image_ids=torch.tensor(image_ids),
        )

    return make


@pytest.fixture
def pairs(make_pairs: Callable[..., PairBatch]) -> PairBatch:
    """Four pairs; the first two are captions of one photograph."""
    return make_pairs([7, 7, 8, 9])
