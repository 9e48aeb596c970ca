"""The order of an epoch: every row once, the same for ever, mixed inside windows only."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.errors import InputError
from pipelines.order import Stream, epoch_order, epoch_slice, generator, steps_per_epoch

UNHURRIED = settings(deadline=None)  # other processes share the cores
GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 10_000)


@UNHURRIED
@given(GROUPS, SEEDS, EPOCHS, st.integers(1, 12))
def test_every_row_appears_exactly_once_an_epoch(group_rows, seed, epoch, window_groups):
    order = epoch_order(group_rows, seed=seed, epoch=epoch, window_groups=window_groups)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(sum(group_rows)))


@UNHURRIED
@given(GROUPS, SEEDS, EPOCHS)
def test_the_order_is_the_same_every_time(group_rows, seed, epoch):
    first = epoch_order(group_rows, seed=seed, epoch=epoch)
    assert np.array_equal(first, epoch_order(np.array(group_rows), seed=seed, epoch=epoch))


@UNHURRIED
@given(SEEDS, EPOCHS)
def test_another_seed_or_epoch_gives_another_order(seed, epoch):
    group_rows = [16] * 20
    order = epoch_order(group_rows, seed=seed, epoch=epoch)
    assert not np.array_equal(order, epoch_order(group_rows, seed=seed + 1, epoch=epoch))
    assert not np.array_equal(order, epoch_order(group_rows, seed=seed, epoch=epoch + 1))


def test_seeds_beyond_63_bits_are_told_apart():
    first, second = (epoch_order([16] * 20, seed=seed, epoch=0) for seed in (2**63, 2**63 + 1))
    assert not np.array_equal(first, second)


@UNHURRIED
@given(GROUPS, SEEDS, st.integers(1, 12))
def test_a_window_holds_the_rows_of_its_groups_and_no_others(group_rows, seed, window_groups):
    group_of_row = np.repeat(np.arange(len(group_rows)), group_rows)
    groups = group_of_row[epoch_order(group_rows, seed=seed, epoch=0, window_groups=window_groups)]
    order_of_groups = generator(Stream.GROUPS, seed=seed, epoch=0).permutation(len(group_rows))
    position = 0
    for first in range(0, len(group_rows), window_groups):
        members = order_of_groups[first : first + window_groups]
        size = sum(group_rows[group] for group in members)
        assert set(groups[position : position + size]) == set(members)
        position += size
    assert position == sum(group_rows)


@UNHURRIED
@given(GROUPS, SEEDS, EPOCHS, st.data())
def test_a_slice_equals_that_part_of_the_whole_order(group_rows, seed, epoch, data):
    start = data.draw(st.integers(0, sum(group_rows) - 1))
    stop = data.draw(st.integers(start + 1, sum(group_rows)))
    part = epoch_slice(group_rows, start=start, stop=stop, seed=seed, epoch=epoch, window_groups=3)
    whole = epoch_order(group_rows, seed=seed, epoch=epoch, window_groups=3)
    assert np.array_equal(part, whole[start:stop])


def test_rows_of_one_group_are_spread_over_their_window():
    order = epoch_order([100] * 8, seed=0, epoch=0, window_groups=8)
    neighbors_in_one_group = np.mean(order[1:] // 100 == order[:-1] // 100)
    # An eighth is the chance level; 0.05 is four deviations of 799 draws.
    assert neighbors_in_one_group == pytest.approx(1 / 8, abs=0.05)


def test_two_epochs_put_a_row_at_unrelated_places():
    first, second = (np.argsort(epoch_order([16] * 64, seed=3, epoch=epoch)) for epoch in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.25  # two deviations of 64 independent groups


def test_the_remainder_that_is_dropped_differs_between_epochs():
    orders = [epoch_order([10] * 21, seed=1, epoch=epoch) for epoch in range(2)]
    steps = steps_per_epoch(210, 64)
    dropped = [set(order[steps * 64 :].tolist()) for order in orders]
    assert [len(rows) for rows in dropped] == [18, 18]
    assert dropped[0] != dropped[1]


def test_over_many_epochs_every_image_is_dropped_about_equally_often():
    # The corpus of the other tests: short groups at the ends of shards, 203 images, 11 dropped.
    groups, batch_size, num_epochs = [*[16] * 7, 8, *[16] * 5, 3], 32, 4000
    first = steps_per_epoch(203, batch_size) * batch_size
    counts = np.zeros(203, dtype=int)
    for epoch in range(num_epochs):
        dropped = epoch_slice(groups, start=first, stop=203, seed=2, epoch=epoch)
        assert len(set(dropped.tolist())) == 203 - first
        counts[dropped] += 1
    expected = num_epochs * (203 - first) / 203
    # Five deviations of so many draws are 34 %; rows of short groups share a smaller window.
    assert np.abs(counts / expected - 1).max() < 0.4
    assert np.abs(counts[:112].reshape(7, 16).mean(axis=1) / expected - 1).max() < 0.12


def test_an_epoch_and_its_remainder_hold_every_image_exactly_once():
    groups, batch_size = [*[16] * 7, 8, *[16] * 5, 3], 32
    steps = steps_per_epoch(203, batch_size)
    for epoch in range(5):
        starts = range(0, steps * batch_size, batch_size)
        batches = [
            epoch_slice(groups, start=start, stop=start + batch_size, seed=2, epoch=epoch)
            for start in starts
        ]
        dropped = epoch_slice(groups, start=steps * batch_size, stop=203, seed=2, epoch=epoch)
        seen = np.concatenate([*batches, dropped])
        assert sorted(seen.tolist()) == list(range(203))


def test_the_order_never_changes_between_releases():
    order = epoch_order([256] * 30 + [17], seed=7, epoch=2)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    # This program's own, of its first release: runs that resume under a new one rely on it.
    assert digest[:16] == "d53969dda94ddaab"


@pytest.mark.parametrize(("images", "batch", "steps"), [(64, 64, 1), (127, 64, 1), (128, 64, 2)])
def test_an_epoch_has_the_whole_batches_only(images, batch, steps):
    assert steps_per_epoch(images, batch) == steps


def test_a_corpus_smaller_than_a_batch_is_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"--batch-size 64 is more than the 63 images.*at most 63"):
        steps_per_epoch(63, 64)


@UNHURRIED
@given(SEEDS, EPOCHS, st.integers(0, 2**63 - 1))
def test_generators_of_different_keys_draw_different_numbers(seed, epoch, item):
    keys = [
        (Stream.PAIR, seed, epoch, item),
        (Stream.PAIR, seed + 1, epoch, item),
        (Stream.PAIR, seed, epoch + 1, item),
        (Stream.PAIR, seed, epoch, item + 1),
        (Stream.WINDOW, seed, epoch, item),
    ]
    draws = {
        int(generator(stream, seed=s, epoch=e, item=i).integers(2**63)) for stream, s, e, i in keys
    }
    assert len(draws) == len(keys)
