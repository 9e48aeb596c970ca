import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.near_duplicates import near_groups, near_pairs

hashes = st.lists(
    st.integers(0, 15).map(lambda low: low * 0x1111_0000_1111_0001) | st.integers(0, 2**64 - 1),
    min_size=1,
    max_size=40,
).map(lambda values: np.array(values, dtype=np.uint64))


def apart(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.bitwise_count(left[:, None] ^ right[None])


@given(left=hashes, right=hashes, radius=st.integers(0, 12))
def test_pairs_are_those_that_comparing_all_with_all_finds(left, right, radius):
    expected = np.argwhere(apart(left, right) <= radius).T

    assert near_pairs(left, right, radius).tolist() == expected.tolist()


@given(values=hashes, radius=st.integers(0, 12))
def test_groups_are_what_steps_of_the_radius_link_named_by_their_first(values, radius):
    is_linked = apart(values, values) <= radius
    for _ in values:
        is_linked = is_linked @ is_linked
    expected = is_linked.argmax(axis=1)

    assert near_groups(values, radius).tolist() == expected.tolist()


@pytest.mark.parametrize("shared_bits", [0, 16, 63])
def test_copies_are_found_among_very_many_that_share_part_of_their_hash(shared_bits):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 20_000, dtype=np.uint64) >> np.uint64(shared_bits)
    values[-1] = np.uint64(2**63 + 2**40)
    values[0] = values[-1] ^ np.uint64(0b1111)

    assert near_groups(values, 4)[-1] == 0


def test_no_hash_at_all_has_no_group():
    assert near_groups(np.array([], dtype=np.uint64), 4).tolist() == []
    assert near_pairs(*[np.array([], dtype=np.uint64)] * 2, 8).shape == (2, 0)
