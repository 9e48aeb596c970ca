import numpy as np
import pytest

from albef_core.metrics import retrieval_metrics
from albef_core.paired import Difference, hit_shares, paired_bootstrap

RNG = np.random.default_rng(0)


def compare(candidate, champion, groups, *, num_resamples=2000, seed=0, **more):
    return paired_bootstrap(
        candidate, champion, groups, num_resamples=num_resamples, seed=seed, **more
    )


def test_a_model_is_not_better_than_itself():
    scores = RNG.random(50)
    assert compare(scores, scores, np.arange(50)) == Difference(value=0.0, low=0.0, high=0.0)


def test_a_shift_of_every_row_is_found_exactly_however_much_rows_differ():
    champion = RNG.normal(0, 100, 60)
    found = compare(champion + 0.25, champion, np.arange(60) // 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_exchanging_the_models_turns_the_sign():
    one, other = RNG.random(40), RNG.random(40)
    there, back = compare(one, other, np.arange(40)), compare(other, one, np.arange(40))
    mirrored = (-back.value, -back.high, -back.low)
    assert (there.value, there.low, there.high) == pytest.approx(mirrored)


def test_the_interval_of_independent_rows_is_as_wide_as_the_normal_law_says():
    num = 500
    difference = RNG.normal(0.1, 1.0, num)
    found = compare(difference, np.zeros(num), np.arange(num), num_resamples=8000)
    width = 2 * 1.96 * difference.std() / num**0.5
    # The bootstrap's own noise is a few percent.
    assert found.high - found.low == pytest.approx(width, rel=0.06)
    assert found.value == pytest.approx(difference.mean())
    wider = compare(difference, np.zeros(num), np.arange(num), num_resamples=8000, coverage=0.99)
    assert wider.high - wider.low == pytest.approx(width * 2.576 / 1.96, rel=0.06)


def test_five_equal_rows_of_a_picture_tell_no_more_than_one():
    per_picture = RNG.normal(0, 1, 100)
    rows, picture = np.repeat(per_picture, 5), np.repeat(np.arange(100), 5)
    found = compare(rows, np.zeros(500), picture)
    once = compare(per_picture, np.zeros(100), np.arange(100))
    blind = compare(rows, np.zeros(500), np.arange(500))
    assert (found.value, found.low, found.high) == pytest.approx((once.value, once.low, once.high))
    assert found.high - found.low == pytest.approx(5**0.5 * (blind.high - blind.low), rel=0.1)


def test_the_numbers_and_the_order_of_groups_mean_nothing():
    one, other, picture = RNG.random(30), RNG.random(30), np.repeat(np.arange(10), 3)
    found = compare(one, other, picture)
    assert compare(one, other, picture * 1000 - 7) == found


def test_an_interval_holds_the_truth_as_often_as_it_promises():
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        # Pictures differ, and the rows of one picture resemble each other.
        rows = 0.3 + np.repeat(rng.normal(0, 1, 80), 3) + rng.normal(0, 1, 240)
        found = compare(rows, np.zeros(240), np.repeat(np.arange(80), 3), num_resamples=400)
        held += found.low <= 0.3 <= found.high
    # 190 expected of 200, standard deviation 3.1; a percentile interval is a little narrow.
    assert 180 <= held <= 199


def test_with_parts_the_difference_is_that_of_mean_recall_and_so_is_its_spread():
    image_of_text = np.repeat(np.arange(20), [1 + n % 4 for n in range(20)])
    num_texts = len(image_of_text)
    hits, recalls = [], []
    for seed in (1, 2):
        scores = np.random.default_rng(seed).random((20, num_texts))
        hits.append(np.concatenate(hit_shares(scores, scores, image_of_text)))
        measured = retrieval_metrics(scores, scores, image_of_text, num_resamples=3000, seed=0)
        recalls.append(measured["mean_recall"])
    groups = np.concatenate([np.arange(20), image_of_text])
    parts = np.repeat([0, 1], [20, num_texts])
    found = compare(*hits, groups, parts=parts)
    assert found.value == pytest.approx(recalls[0].value - recalls[1].value)
    alone = compare(hits[0], np.zeros(len(groups)), groups, parts=parts, num_resamples=3000)
    assert (alone.low, alone.high) == pytest.approx((recalls[0].low, recalls[0].high))


def test_a_query_scores_one_third_for_each_of_the_ranks_1_5_and_10_that_it_reaches():
    scores = np.tile(np.arange(12.0), (12, 1))
    # Texts are ranked 11, 10, ..., so image n has 11 - n foreign texts before its own.
    images, texts = hit_shares(scores, scores, np.arange(12))
    by_rank = [1, *[2 / 3] * 4, *[1 / 3] * 5, 0, 0]
    assert images[::-1].tolist() == pytest.approx(by_rank)
    # All images score the same for a text: the tie counts against it.
    assert texts.tolist() == [0] * 12
