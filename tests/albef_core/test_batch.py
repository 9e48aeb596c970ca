from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from albef_core.batch import PairBatch, normalize
from albef_core.preprocess import MEAN, STD


def test_normalized_pixels_have_the_published_mean_and_deviation_taken_out() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = normalize(torch.from_numpy(pixels))
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    # Computed in float32, against float64.
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert images.dtype == torch.float32


def test_normalizing_leaves_the_pixels_as_they_were() -> None:
    pixels = torch.full((1, 2, 2, 3), 200, dtype=torch.uint8)
    normalize(pixels)
    assert (pixels == 200).all()


def test_a_batch_is_as_long_as_its_pairs_and_cannot_be_changed(pairs: PairBatch) -> None:
    assert len(pairs) == len(pairs.images)
    with pytest.raises(FrozenInstanceError):
        pairs.images = pairs.images[:1]  # pyright: ignore[reportAttributeAccessIssue]  # the point


def test_a_batch_whose_parts_differ_in_length_is_caught(pairs: PairBatch) -> None:
    with pytest.raises(TypeCheckError):
        PairBatch(
            images=pairs.images,
            token_ids=pairs.token_ids[:2],
            attention_mask=pairs.attention_mask,
            masked_ids=pairs.masked_ids,
            mlm_labels=pairs.mlm_labels,
            image_ids=pairs.image_ids,
        )
