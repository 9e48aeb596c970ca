import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albef_core.metrics import auc, auc_estimate


def literal_auc(scores, is_positive):
    """Count all pairs of a positive and a negative row, a tie for one half."""
    positives = [s for s, yes in zip(scores, is_positive, strict=True) if yes]
    negatives = [s for s, yes in zip(scores, is_positive, strict=True) if not yes]
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def test_three_of_four_pairs_are_in_order():
    scores, is_positive = np.array([0.9, 0.4, 0.5, 0.1]), np.array([True, True, False, False])

    assert auc(scores, is_positive) == 0.75


def test_a_constant_score_is_as_good_as_chance():
    assert auc(np.zeros(5), np.array([True, False, False, True, False])) == 0.5


rows = st.lists(
    st.tuples(st.sampled_from([-np.inf, -2.0, 0.0, 0.5, 3.0, np.inf]), st.booleans()),
    min_size=2,
    max_size=40,
).filter(lambda rows: len({yes for _, yes in rows}) == 2)


@given(rows=rows)
def test_the_area_equals_the_literal_count_of_pairs(rows):
    scores, is_positive = (np.array(column) for column in zip(*rows, strict=True))

    assert auc(scores, is_positive) == pytest.approx(literal_auc(scores, is_positive))


@given(rows=rows)
def test_the_other_way_round_it_is_the_rest_of_one(rows):
    scores, is_positive = (np.array(column) for column in zip(*rows, strict=True))

    assert auc(-scores, is_positive) == pytest.approx(1 - auc(scores, is_positive))


def test_a_resample_counts_a_picture_s_rows_as_often_as_it_is_drawn():
    rng = np.random.default_rng(0)
    scores, image_of_row = rng.integers(0, 5, 12).astype(float), np.repeat([7, 3, 5, 9], 3)
    is_positive = np.tile([True, False, False], 4)

    found = auc_estimate(scores, is_positive, image_of_row, num_resamples=60, seed=4)

    # Pictures are numbered by their value: 3, 5, 7, 9.
    places = {picture: np.flatnonzero(image_of_row == picture) for picture in (3, 5, 7, 9)}
    again, areas = np.random.default_rng(4), []
    for _ in range(60):
        times = again.multinomial(4, np.full(4, 0.25))
        drawn = np.concatenate(
            [np.tile(places[p], n) for p, n in zip((3, 5, 7, 9), times, strict=True)]
        )
        areas.append(literal_auc(scores[drawn], is_positive[drawn]))
    assert found.value == pytest.approx(literal_auc(scores, is_positive))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])))
    assert found.chance == 0.5


def test_resamples_of_one_kind_are_left_out():
    # Two pictures: half of the resamples draw one of them twice.
    found = auc_estimate(
        np.array([1.0, 0.0]), np.array([True, False]), np.array([0, 1]), num_resamples=40, seed=0
    )

    assert (found.low, found.value, found.high) == (1, 1, 1)
