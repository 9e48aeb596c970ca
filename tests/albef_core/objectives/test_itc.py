"""ITC agrees with its equations; tolerances are stated where both sides round."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.feature_queue import NO_IMAGE, FeatureQueue
from albef_core.model import MAX_TEMPERATURE, MIN_TEMPERATURE
from albef_core.objectives.itc import Keys, gather_keys, itc_loss, itc_targets, similarities
from tests.albef_core import literal

# Both sides compute in float64 and differ in the order of their sums. At the lowest temperature
# similarities reach 1,000, and the rounding of their cosines is divided by it too.
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
# Gradients at the lowest temperature are sums of terms up to 1,000 that may cancel.
SLOPE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-8}

TEMPERATURES = [MIN_TEMPERATURE, 0.07, MAX_TEMPERATURE]


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def all_ask(features: torch.Tensor, queue: FeatureQueue, image_ids: torch.Tensor) -> Keys:
    """The keys of a batch that is on one worker."""
    queries = range(len(features))
    return gather_keys(features, image_ids, queue, queries=queries, image_id_positives=True)


class Case:
    """A random contrast: queries, teacher's queries and keys, ids with duplicates, a queue."""

    def __init__(self, *, num_pairs: int, num_slots: int, num_written: int, num_images: int, seed):
        rng = np.random.default_rng(seed)
        self.queries, self.teacher_queries = (unit_rows(rng, num_pairs, 3) for _ in range(2))
        self.keys = unit_rows(rng, num_pairs, 3)
        self.image_ids = rng.integers(num_images, size=num_pairs)
        self.queue = FeatureQueue(num_slots, 3).double()
        if num_written:
            self.queue.push(
                torch.from_numpy(unit_rows(rng, num_written, 3)),
                torch.from_numpy(rng.integers(num_images, size=num_written)),
            )
        # What was never written must not matter, whatever lies there.
        self.queue.features[~self.queue.is_valid] = 1e6
        self.queue.image_ids[~self.queue.is_valid] = 0

    def gather(self, *, by_id: bool) -> Keys:
        return gather_keys(
            torch.from_numpy(self.keys),
            torch.from_numpy(self.image_ids),
            self.queue,
            queries=range(len(self.keys)),
            image_id_positives=by_id,
        )

    def literal_keys(self, *, by_id: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys, which of them are positive, and which count."""
        ids, valid = self.queue.image_ids.numpy(), self.queue.is_valid.numpy()
        positive = literal.positives(self.image_ids, ids, valid, by_id=by_id)
        keys = np.concatenate([self.keys, self.queue.features.numpy()])
        return keys, positive, np.concatenate([np.ones(len(self.keys), bool), valid])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_slots = draw(st.integers(1, 5))
    num_pairs = draw(st.integers(1, 4))
    return Case(
        num_pairs=num_pairs,
        num_slots=num_slots,
        num_written=draw(st.sampled_from([0, (num_slots + 1) // 2, num_slots])),
        num_images=draw(st.sampled_from([1, 2, 100])),
        seed=draw(st.integers(0, 999)),
    )


@settings(max_examples=40)
@given(
    case=cases(),
    by_id=st.booleans(),
    temperature=st.sampled_from(TEMPERATURES),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_itc_equals_its_equations_forward_and_backward(
    case: Case, by_id: bool, temperature: float, alpha: float
) -> None:
    keys = case.gather(by_id=by_id)
    queries = torch.from_numpy(case.queries).requires_grad_()
    scale = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    teacher = similarities(torch.from_numpy(case.teacher_queries), keys, scale).detach()
    targets = itc_targets(teacher, keys.is_positive, alpha=alpha)
    loss = itc_loss(similarities(queries, keys, scale), targets, count=float(len(queries)))
    loss.backward()

    all_keys, positive, valid = case.literal_keys(by_id=by_id)
    soft = literal.similarities(case.teacher_queries, all_keys, temperature)
    expected = literal.itc_targets(soft, positive, valid, alpha=alpha)

    def slow_loss(queries: np.ndarray, temperature):
        return literal.itc_loss(
            literal.similarities(queries, all_keys, temperature), expected, valid
        )

    np.testing.assert_array_equal(keys.is_positive.numpy(), positive)
    np.testing.assert_allclose(targets.numpy(), expected, **EXACT)
    np.testing.assert_allclose(loss.item(), slow_loss(case.queries, temperature), **EXACT)
    slopes = literal.gradient(lambda x: slow_loss(x, temperature), case.queries)
    assert queries.grad is not None
    np.testing.assert_allclose(queries.grad.numpy(), slopes, **SLOPE)
    slope = literal.gradient(lambda x: slow_loss(case.queries, x[0]), np.array([temperature]))
    assert scale.grad is not None
    # A thousand times steeper yet: the derivative by the temperature divides by its square.
    np.testing.assert_allclose(scale.grad.item(), slope[0], rtol=1e-9, atol=1e-5)


@settings(max_examples=40)
@given(case=cases(), alpha=st.floats(0, 1), by_id=st.booleans())
def test_every_row_of_targets_sums_to_one_and_unwritten_slots_get_nothing(
    case: Case, alpha: float, by_id: bool
) -> None:
    keys = case.gather(by_id=by_id)
    queries = torch.from_numpy(case.teacher_queries)
    teacher = similarities(queries, keys, torch.tensor(0.07, dtype=torch.float64))
    targets = itc_targets(teacher, keys.is_positive, alpha=alpha)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones_like(targets[:, 0]))
    assert (targets[:, ~keys.is_valid] == 0).all()


def test_two_captions_of_one_photograph_share_the_target() -> None:
    positive = torch.tensor([[True, True, False]])
    similarity = torch.tensor([[2.0, 2.0, 0.0]])
    targets = itc_targets(similarity, positive, alpha=0.0)
    torch.testing.assert_close(targets, torch.tensor([[0.5, 0.5, 0.0]]))
    expected = -similarity.log_softmax(dim=1)[0, 0]
    torch.testing.assert_close(itc_loss(similarity, targets, count=1.0), expected)


def test_a_photograph_still_in_the_queue_is_positive_and_a_stale_id_is_not() -> None:
    queue = FeatureQueue(4, 2)
    queue.push(torch.eye(2), torch.tensor([5, 6]))
    keys = all_ask(torch.eye(2), queue, torch.tensor([6, 0]))
    # Slots 2 and 3 were never written: their id 0 is no photograph.
    assert keys.is_positive.tolist() == [
        [True, False, False, True, False, False],
        [False, True, False, False, False, False],
    ]


@pytest.mark.parametrize("by_id", [True, False])
def test_a_share_of_the_batch_has_the_rows_of_the_whole(by_id: bool) -> None:
    queue = FeatureQueue(4, 2)
    queue.push(torch.eye(2), torch.tensor([5, 6]))
    features, ids = torch.randn(5, 2), torch.tensor([6, 0, 1, 1, 6])
    whole = gather_keys(features, ids, queue, queries=range(5), image_id_positives=by_id)
    share = gather_keys(features, ids, queue, queries=range(2, 4), image_id_positives=by_id)
    assert torch.equal(share.is_positive, whole.is_positive[2:4])
    assert torch.equal(share.features, whole.features)


def test_random_vectors_of_no_image_are_nobodys_positives() -> None:
    queue = FeatureQueue(3, 2)
    queue.fill_randomly(torch.Generator().manual_seed(0))
    keys = all_ask(torch.eye(2), queue, torch.tensor([NO_IMAGE, 1]))
    assert not keys.is_positive[:, 2:].any()


def test_an_empty_queue_gives_the_loss_of_no_queue() -> None:
    rng = np.random.default_rng(0)
    queries, own = (torch.from_numpy(unit_rows(rng, 4, 8)).float() for _ in range(2))
    losses = []
    for num_slots in (0, 16):
        keys = all_ask(own, FeatureQueue(num_slots, 8), torch.tensor([1, 1, 2, 3]))
        similarity = similarities(queries, keys, torch.tensor(0.07))
        targets = itc_targets(similarity, keys.is_positive, alpha=0.4)
        losses.append(itc_loss(similarity, targets, count=4.0))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, MAX_TEMPERATURE])
def test_float32_stays_finite_at_both_ends_of_the_temperature(temperature: float) -> None:
    queue = FeatureQueue(4, 2)
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    scale = torch.tensor(temperature, requires_grad=True)
    keys = all_ask(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), queue, torch.tensor([1, 2]))
    similarity = similarities(queries, keys, scale)
    targets = itc_targets(similarity.detach(), keys.is_positive, alpha=0.4)
    loss = itc_loss(similarity, targets, count=2.0)
    loss.backward()
    # Every pair is as wrong as can be: right -1, wrong 1. The label asks for the right one, the
    # teacher for the wrong one, and the two log shares differ by 2 / temperature.
    gap = 2 / temperature
    share = 1 / (1 + np.exp(-gap))
    expected = np.log1p(np.exp(-gap)) + (0.6 + 0.4 * (1 - share)) * gap
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    assert scale.grad is not None
    assert scale.grad.isfinite()


def test_similarities_under_autocast_are_float32_products() -> None:
    rng = np.random.default_rng(0)
    queries, own = (torch.from_numpy(unit_rows(rng, 6, 64)).float() for _ in range(2))
    keys = all_ask(own, FeatureQueue(1, 64), torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        similarity = similarities(queries, keys, torch.tensor(0.01))
    exact = queries.double() @ own.double().T / 0.01
    # bfloat16 would be off by up to 0.4 here.
    torch.testing.assert_close(similarity[:, :6], exact.float(), rtol=1e-5, atol=1e-4)
    assert similarity.dtype == torch.float32
