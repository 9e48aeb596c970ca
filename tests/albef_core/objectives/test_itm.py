"""ITM agrees with its equations, and never calls another caption of the same photograph wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.batch import PairBatch
from albef_core.model import ALBEF
from albef_core.objectives.itm import (
    draw_hard_negatives,
    itm_labels,
    itm_loss,
    match_pairs,
    negative_weights,
)
from tests.albef_core import literal

# Both sides compute in float64 and differ in the order of their sums.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def drawn_from(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    numbers = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    return draw_hard_negatives(weights, numbers)


def same_image(image_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor(image_ids)
    return ids[:, None] == ids


IMAGE_IDS = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    image_ids=IMAGE_IDS,
    by_id=st.booleans(),
    guard_empty=st.booleans(),
    temperature=st.sampled_from([0.001, 0.07, 0.5]),
    seed=st.integers(0, 999),
)
def test_weights_equal_the_softmax_of_the_other_images(
    image_ids: list[int], by_id: bool, guard_empty: bool, temperature: float, seed: int
) -> None:
    num = len(image_ids)
    similarity = np.random.default_rng(seed).uniform(-1, 1, (num, num)) / temperature
    same = same_image(image_ids) if by_id else torch.eye(num, dtype=torch.bool)
    weights = negative_weights(torch.from_numpy(similarity), same, guard_empty=guard_empty)
    expected = literal.negative_weights(similarity, same.numpy(), guard_empty=guard_empty)
    np.testing.assert_allclose(weights.numpy(), expected, **EXACT)


@settings(max_examples=60)
@given(image_ids=IMAGE_IDS, seed=st.integers(0, 999))
def test_the_same_photograph_is_never_drawn_where_there_is_another(
    image_ids: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    same = same_image(image_ids)
    # Duplicates look most alike: uncorrected, they would be drawn almost always.
    similarity = torch.where(same, 1.0, -1.0) / 0.001
    weights = negative_weights(similarity, same, guard_empty=True)
    exist = ~same.all(dim=1)
    for _ in range(100):
        drawn = drawn_from(weights, generator)
        assert not same[torch.arange(len(image_ids)), drawn][exist].any()


def test_candidates_are_drawn_in_proportion_to_their_weight() -> None:
    weights = torch.zeros(200, 200)
    weights[:, 1], weights[:, 2] = 0.2, 0.8
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([drawn_from(weights, generator) for _ in range(100)])
    shares = drawn.bincount(minlength=3) / len(drawn)
    assert len(shares) == 3
    assert shares[0] == 0
    # Five standard deviations of a share of 20,000 draws.
    assert shares[2].item() == pytest.approx(0.8, abs=0.015)


def test_each_number_finds_its_place_on_the_line_of_weights() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, 5)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-32], dtype=torch.float64)
    assert draw_hard_negatives(weights, numbers).tolist() == [1, 1, 3, 3, 3]


def test_published_weights_lack_the_positives_share() -> None:
    similarity = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    eye = torch.eye(2, dtype=torch.bool)
    published = negative_weights(similarity, eye, guard_empty=False)
    assert published.tolist() == [[0.0, 0.5], [0.5, 0.0]]
    corrected = negative_weights(similarity, eye, guard_empty=True)
    assert corrected.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_published_weights_stop_the_run_where_a_row_underflows() -> None:
    similarity = torch.eye(2) / 0.001
    eye = torch.eye(2, dtype=torch.bool)
    numbers = torch.tensor([0.0, 0.999], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no candidate"):
        draw_hard_negatives(negative_weights(similarity, eye, guard_empty=False), numbers)
    mended = draw_hard_negatives(negative_weights(similarity, eye, guard_empty=True), numbers)
    assert mended.tolist() == [1, 0]


@pytest.mark.parametrize("num_pairs", [1, 3])
def test_a_batch_of_one_photograph_gives_weights_without_nan(num_pairs: int) -> None:
    same = torch.ones(num_pairs, num_pairs, dtype=torch.bool)
    weights = negative_weights(torch.zeros(num_pairs, num_pairs), same, guard_empty=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_pairs))


@settings(max_examples=60)
@given(data=st.data(), num_pairs=st.integers(1, 4), seed=st.integers(0, 999))
def test_itm_equals_its_equation_forward_and_backward(
    data: st.DataObject, num_pairs: int, seed: int
) -> None:
    exist = data.draw(st.lists(st.booleans(), min_size=num_pairs, max_size=num_pairs))
    logits = np.random.default_rng(seed).normal(scale=5, size=(3 * num_pairs, 2))
    labels = itm_labels(num_pairs, torch.device("cpu"))
    counts = torch.tensor([True] * num_pairs + exist + exist)
    ours = torch.from_numpy(logits).requires_grad_()
    loss = itm_loss(ours, labels, counts, count=counts.double().sum())
    loss.backward()
    arguments = (labels.numpy(), counts.numpy())
    np.testing.assert_allclose(loss.item(), literal.itm_loss(logits, *arguments), **EXACT)
    slopes = literal.gradient(lambda x: literal.itm_loss(x, *arguments), logits)
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), slopes, **EXACT)


def test_without_any_negative_the_loss_is_that_of_the_true_pairs() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, -2.0], [-1.0, 4.0]], requires_grad=True)
    labels, counts = itm_labels(1, logits.device), torch.tensor([True, False, False])
    loss = itm_loss(logits, labels, counts, count=counts.float().sum())
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(np.log1p(np.exp(-1.0)), dtype=torch.float32))
    assert logits.grad is not None
    assert (logits.grad[1:] == 0).all()
    assert logits.grad[0].abs().min() > 0


def test_true_pairs_come_first_then_wrong_images_then_wrong_texts() -> None:
    assert itm_labels(2, torch.device("cpu")).tolist() == [1, 1, 0, 0, 0, 0]


def test_each_row_of_logits_matches_the_pair_it_stands_for(
    tiny_model: ALBEF, make_pairs: Callable[..., PairBatch]
) -> None:
    batch = make_pairs([1, 2, 3])
    image_tokens, _ = tiny_model.encode_image(batch.images)
    text_tokens, _ = tiny_model.encode_text(batch.token_ids, batch.attention_mask)
    wrong_images, wrong_texts = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    logits = torch.cat(
        match_pairs(
            tiny_model,
            image_tokens,
            image_tokens[wrong_images],
            text_tokens,
            batch.attention_mask,
            text_tokens[wrong_texts],
            batch.attention_mask[wrong_texts],
        )
    )
    texts = [0, 1, 2, 0, 1, 2, 2, 0, 1]
    images = [0, 1, 2, 1, 2, 0, 0, 1, 2]
    for row, (text, image) in enumerate(zip(texts, images, strict=True)):
        fused = tiny_model.fuse(
            text_tokens[text, None], batch.attention_mask[text, None], image_tokens[image, None]
        )
        # Matrix products of another size round otherwise.
        torch.testing.assert_close(
            logits[row], tiny_model.itm_head(fused[0, 0]), rtol=1e-5, atol=1e-5
        )
