"""Worked out by hand: three pictures, the last with two captions."""

import numpy as np
import pytest

from pipelines.retrieval_findings import Judged, caption_slices, find_cases, sweep

OWNER = np.array([0, 1, 2, 2])
TEXTS = ["a red dog", "a cat", "one two three four five six", "b"]


@pytest.fixture
def judged() -> Judged:
    """ITC is right of everything but text 0, which it gives to picture 1; ITM judged the top 2."""
    similarity = np.array(
        [[0.5, 0.1, 0.2, 0.0], [0.6, 0.9, 0.1, 0.3], [0.1, 0.2, 0.8, 0.7]], dtype=np.float32
    )
    pairs = [(0, 0), (0, 2), (1, 0), (1, 1), (1, 3), (2, 1), (2, 2), (2, 3)]
    match = [3.0, -2.0, 1.0, 2.0, 4.0, -3.0, 5.0, 0.5]
    logits = np.stack([np.zeros(8), match], axis=1).astype(np.float32)
    return Judged(similarity=similarity, pairs=np.array(pairs), logits=logits, image_of_text=OWNER)


def test_what_was_judged_is_ranked_by_itm_and_the_rest_comes_below(judged: Judged) -> None:
    image_to_text, text_to_image = judged.scores(2)
    assert image_to_text[0].argsort()[::-1].tolist() == [0, 2, 1, 3]
    assert image_to_text[1].argsort()[::-1].tolist() == [1, 0, 3, 2]
    assert text_to_image[:, 3].argsort()[::-1].tolist() == [1, 2, 0]


def test_one_candidate_leaves_the_order_to_itc(judged: Judged) -> None:
    image_to_text, text_to_image = judged.scores(1)
    by_itc = judged.similarity.argsort(axis=1)
    np.testing.assert_array_equal(image_to_text.argsort(axis=1), by_itc)
    np.testing.assert_array_equal(text_to_image.argmax(axis=0), judged.similarity.argmax(axis=0))


def test_a_sweep_counts_a_pair_wanted_both_ways_once(judged: Judged) -> None:
    points = sweep(judged, top_k=2, num_resamples=10, seed=0)
    assert [(point.top_k, point.num_pairs) for point in points] == [(1, 5), (2, 8)]
    # With one candidate text 0 finds picture 1, with two its own; but then text 3 goes wrong.
    assert [point.mean_recall.value for point in points] == pytest.approx([0.958333] * 2, abs=1e-6)


def test_slices_are_of_captions_by_their_length(judged: Judged) -> None:
    slices = caption_slices(judged.scores(2)[1], OWNER, TEXTS, num_resamples=10, seed=0)
    assert slices.keys() == {"short text", "medium text"}
    assert slices["short text"]["ir_r1"].value == pytest.approx(2 / 3)
    assert slices["short text"]["ir_r1"].chance == pytest.approx(1 / 3)
    assert slices["medium text"]["ir_r1"].value == 1


def test_cases_are_the_surest_of_each_direction_right_and_wrong(judged: Judged) -> None:
    cases = find_cases(judged, judged.scores(2), num=1)
    (wrong,) = cases["worst"]
    assert (wrong.direction, wrong.image, wrong.text, wrong.found) == ("text to image", 2, 3, 1)
    assert (wrong.rank, wrong.match) == (1, pytest.approx(1 / (1 + np.exp(-4))))
    image, text = cases["best"]
    assert (image.direction, image.image, image.text, image.found) == ("image to text", 2, 2, 2)
    assert (text.direction, text.image, text.text, text.found) == ("text to image", 2, 2, 2)
    assert (image.rank, text.rank) == (0, 0)
