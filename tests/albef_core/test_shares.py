"""Every pair of a global batch belongs to one worker."""

from itertools import pairwise

import pytest

from albef_core.shares import share_of


@pytest.mark.parametrize(("num_pairs", "world_size"), [(7, 3), (64, 4), (5, 5), (512, 7)])
def test_shares_follow_each_other_and_differ_by_one_at_most(
    num_pairs: int, world_size: int
) -> None:
    shares = [share_of(rank, world_size, num_pairs) for rank in range(world_size)]
    assert shares[0].start == 0
    assert shares[-1].stop == num_pairs
    assert all(left.stop == right.start for left, right in pairwise(shares))
    assert {len(share) for share in shares} <= {
        num_pairs // world_size,
        -(-num_pairs // world_size),
    }
