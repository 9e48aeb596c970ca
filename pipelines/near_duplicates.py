"""Near-equal 64-bit hashes among millions, without comparing all with all."""

from collections.abc import Iterator
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
PAIRS_AT_ONCE = 2**21
# A row sorted costs about as much as so many pairs compared (measured on one core).
PAIRS_PER_ROW = 8
MAX_BANDS = 16
MAX_MASKS = 600

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


def near_groups(hashes: Hashes, radius: int) -> Places:
    """Group hashes that are linked by steps of at most `radius` bits.

    Gives the place of the first member of each hash's group. Equal hashes cost no more than one;
    memory is a few words a hash, however many are alike.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    group = np.arange(len(values))
    for mask in _masks(len(values), len(values), radius):
        links: list[Places] = []
        for pairs in _near_within(values, mask, radius):
            ends = group[pairs]
            links.append(np.unique(ends[:, ends[0] != ends[1]], axis=1))
            if sum(part.shape[1] for part in links) > PAIRS_AT_ONCE:
                group, links = _joined(group, links), []
        group = _joined(group, links)
    leader = np.full(len(values), len(hashes))
    np.minimum.at(leader, group, first)
    return leader[group][inverse]


def near_pairs(left: Hashes, right: Hashes, radius: int) -> Places:
    """Find all (place in `left`, place in `right`) at most `radius` bits apart, sorted: (2, N)."""
    found = np.empty((2, 0), dtype=np.int64)
    for mask in _masks(len(left), len(right), radius):
        new = list(_near_between(left, right, mask, radius))
        found = np.unique(np.concatenate([found, *new], axis=1), axis=1)
    return found


def _masks(num_left: int, num_right: int, radius: int) -> list[np.uint64]:
    """Give masks such that two hashes at most `radius` bits apart agree under one of them.

    Of n bands of bits, `radius` bits that differ spoil `radius` at most, so that some n - radius
    bands agree. Few bands make few masks, many make masks that unrelated hashes seldom agree under:
    the cheapest n is taken. Neighboring bits of a perceptual hash go together, hence every n-th
    bit is of one band.
    """

    def cost(num_bands: int) -> float:
        num_bits = BITS * (num_bands - radius) / num_bands
        chance_pairs = num_left * num_right / 2**num_bits
        num_masks = comb(num_bands, radius)
        return num_masks * (PAIRS_PER_ROW * (num_left + num_right) + chance_pairs)

    able = (n for n in range(radius + 1, MAX_BANDS + 1) if comb(n, radius) <= MAX_MASKS)
    num_bands = min(able, key=cost)
    bands = [sum(1 << bit for bit in range(b, BITS, num_bands)) for b in range(num_bands)]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, num_bands - radius)]


def _near_within(values: Hashes, mask: np.uint64, radius: int) -> Iterator[Places]:
    keys = values & mask
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sizes = np.diff(starts, append=len(keys))
    ends = np.repeat(starts + sizes, sizes)
    places = np.arange(len(keys))
    for left, right in _spans(places, places + 1, ends):
        pairs = np.stack([order[left], order[right]])
        yield _within(values, values, pairs, radius)


def _near_between(left: Hashes, right: Hashes, mask: np.uint64, radius: int) -> Iterator[Places]:
    keys = right & mask
    order = np.argsort(keys)
    keys, wanted = keys[order], left & mask
    starts = np.searchsorted(keys, wanted, side="left")
    ends = np.searchsorted(keys, wanted, side="right")
    for own, other in _spans(np.arange(len(left)), starts, ends):
        yield _within(left, right, np.stack([own, order[other]]), radius)


def _spans(places: Places, starts: Places, ends: Places) -> Iterator[tuple[Places, Places]]:
    """Pair each place with all from its start up to its end, some millions of pairs at a time."""
    some = np.flatnonzero(ends > starts)
    places, starts, sizes = places[some], starts[some], (ends - starts)[some]
    done = np.cumsum(sizes)
    first = 0
    while first < len(places):
        before = done[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(done, before + PAIRS_AT_ONCE, side="right")))
        count = sizes[first:last]
        offset = np.arange(count.sum()) - np.repeat(done[first:last] - count - before, count)
        yield np.repeat(places[first:last], count), np.repeat(starts[first:last], count) + offset
        first = last


def _within(left: Hashes, right: Hashes, pairs: Places, radius: int) -> Places:
    differing = np.bitwise_count(left[pairs[0]] ^ right[pairs[1]])
    return pairs[:, differing <= radius]


def _joined(group: Places, links: list[Places]) -> Places:
    ends = np.concatenate([np.empty((2, 0), dtype=np.int64), *links], axis=1)
    if not ends.size:
        return group
    shape = (len(group), len(group))
    graph = coo_array((np.ones(ends.shape[1], dtype=np.int8), (ends[0], ends[1])), shape=shape)
    _num_groups, group_of = connected_components(graph, directed=False)
    return group_of[group].astype(np.int64)
