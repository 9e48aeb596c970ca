import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.feature_queue import NO_IMAGE, FeatureQueue
from tests.albef_core.literal import Ring


def numbered_rows(first: int, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and ids from which the row can be told."""
    ids = torch.arange(first, first + num)
    return torch.stack([ids, -ids], dim=1).float(), ids


@st.composite
def rings_and_batches(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_slots = draw(st.integers(1, 7))
    return num_slots, draw(st.lists(st.integers(1, 3 * num_slots), max_size=6))


@settings(max_examples=60)
@given(rings_and_batches())
def test_queue_is_a_ring_at_any_batch_size(case: tuple[int, list[int]]) -> None:
    num_slots, batches = case
    queue, ring, seen = FeatureQueue(num_slots, 2), Ring(num_slots), 0
    for num in batches:
        features, ids = numbered_rows(seen, num)
        queue.push(features, ids)
        ring.push(ids.tolist())
        seen += num
    assert queue.pointer.item() == ring.next
    assert queue.is_valid.tolist() == [row is not None for row in ring.rows]
    assert [
        image_id if is_valid else None
        for image_id, is_valid in zip(queue.image_ids.tolist(), queue.is_valid, strict=True)
    ] == ring.rows
    written = queue.is_valid.nonzero().squeeze(1)
    torch.testing.assert_close(queue.features[written, 0], queue.image_ids[written].float())
    torch.testing.assert_close(queue.features[written, 1], -queue.image_ids[written].float())
    filled = sum(row is not None for row in ring.rows)
    torch.testing.assert_close(queue.fill_share(), torch.tensor(filled / num_slots))


def test_queue_keeps_the_newest_rows_of_a_batch_larger_than_itself() -> None:
    queue = FeatureQueue(3, 2)
    queue.push(*numbered_rows(0, 7))
    assert queue.image_ids.tolist() == [6, 4, 5]
    assert queue.pointer.item() == 1


def test_queue_starts_empty() -> None:
    queue = FeatureQueue(5, 2)
    assert not queue.is_valid.any()
    assert queue.fill_share().item() == 0


def test_published_start_is_random_unit_vectors_of_no_image() -> None:
    queue = FeatureQueue(50, 8)
    queue.fill_randomly(torch.Generator().manual_seed(3))
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(50))
    assert queue.is_valid.all()
    assert (queue.image_ids == NO_IMAGE).all()
    assert queue.pointer.item() == 0


def test_published_start_depends_on_its_seed_alone() -> None:
    first, second, other = (FeatureQueue(4, 8) for _ in range(3))
    first.fill_randomly(torch.Generator().manual_seed(3))
    second.fill_randomly(torch.Generator().manual_seed(3))
    other.fill_randomly(torch.Generator().manual_seed(4))
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.features, other.features)


def test_queue_stores_no_gradient() -> None:
    queue = FeatureQueue(4, 2)
    features, ids = numbered_rows(0, 3)
    queue.push(features.requires_grad_(), ids)
    assert not queue.features.requires_grad


def test_queue_goes_on_from_its_saved_state() -> None:
    queue, restored = FeatureQueue(5, 2), FeatureQueue(5, 2)
    queue.push(*numbered_rows(0, 4))
    restored.load_state_dict(queue.state_dict())
    for ring in (queue, restored):
        ring.push(*numbered_rows(4, 3))
    for name, buffer in queue.state_dict().items():
        assert torch.equal(restored.state_dict()[name], buffer), name
