import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from albef_core.metrics import (
    box_overlap,
    box_scores,
    energy_inside,
    exact_matches,
    hit_chance,
    image_to_text_ranks,
    inside_boxes,
    mean_estimate,
    normalize_answer,
    points_inside,
    retrieval_metrics,
    text_to_image_ranks,
    vqa_accuracies,
)
from tests.golden_folder import GOLDEN, needs_golden

# Two images; texts 0 and 1 belong to image 0, text 2 to image 1.
IMAGE_OF_TEXT = np.array([0, 0, 1])


def measure(scores, image_of_text, *, num_resamples=200, seed=0):
    return retrieval_metrics(scores, scores, image_of_text, num_resamples=num_resamples, seed=seed)


def test_an_image_is_ranked_by_the_best_of_its_texts():
    scores = np.array([[0.1, 0.8, 0.9], [0.7, 0.3, 0.5]])
    # Image 0: its best is 0.8, and 0.9 is foreign. Image 1: its only text has 0.5, 0.7 is foreign.
    assert image_to_text_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 1]


def test_a_text_is_ranked_among_all_images():
    scores = np.array([[0.1, 0.8, 0.9], [0.7, 0.3, 0.5]])
    assert text_to_image_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 0, 1]


def test_a_tie_counts_against_us():
    scores = np.zeros((2, 3))
    assert image_to_text_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 2]
    assert text_to_image_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 1, 1]


def test_a_tie_between_own_texts_costs_nothing():
    scores = np.array([[0.5, 0.5, 0.1], [0.0, 0.0, 1.0]])
    assert image_to_text_ranks(scores, IMAGE_OF_TEXT).tolist() == [0, 0]


def test_a_score_that_is_no_number_never_wins():
    scores = np.full((2, 3), np.nan)
    assert image_to_text_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 2]
    assert text_to_image_ranks(scores, IMAGE_OF_TEXT).tolist() == [1, 1, 1]
    scores = np.array([[0.5, np.nan, np.nan], [0.1, 0.2, 0.3]])
    assert text_to_image_ranks(scores, IMAGE_OF_TEXT)[2] == 1


def test_recalls_of_a_matrix_worked_out_by_hand():
    scores = np.array([[0.1, 0.8, 0.9], [0.7, 0.3, 0.6], [0.2, 0.1, 0.95]])
    found = measure(scores, np.array([0, 1, 2]))
    # Image to text: ranks 2, 2, 0. Text to image: ranks 2, 1, 0.
    assert found["tr_r1"].value == pytest.approx(1 / 3)
    assert found["ir_r1"].value == pytest.approx(1 / 3)
    assert found["tr_r5"].value == found["ir_r10"].value == 1
    assert found["mean_recall"].value == pytest.approx((1 / 3 + 1 / 3 + 4) / 6)


@settings(deadline=None)
@given(
    scores=arrays(np.float64, (4, 9), elements=st.integers(-3, 3).map(float)),
    image_of_text=st.permutations([0, 0, 0, 1, 1, 2, 2, 3, 3]).map(np.array),
)
def test_ranks_equal_a_slow_count(scores, image_of_text):
    slow = []
    for image in range(4):
        own = scores[image][image_of_text == image].max()
        slow.append(sum(score >= own for score in scores[image][image_of_text != image]))
    assert image_to_text_ranks(scores, image_of_text).tolist() == slow
    slow = []
    for text, image in enumerate(image_of_text):
        others = np.delete(scores[:, text], image)
        slow.append(sum(score >= scores[image, text] for score in others))
    assert text_to_image_ranks(scores, image_of_text).tolist() == slow


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_only_the_order_of_scores_matters(seed, scale, shift):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(20 * 40).reshape(20, 40).astype(float)
    image_of_text = np.repeat(np.arange(20), 2)
    assert measure(scores, image_of_text) == measure(scores * scale + shift, image_of_text)


@settings(deadline=None)
@given(num_candidates=st.integers(1, 9), num_right=st.integers(1, 9), k=st.integers(1, 12))
def test_chance_is_the_share_of_draws_that_hold_a_right_one(num_candidates, num_right, k):
    num_right, drawn = min(num_right, num_candidates), min(k, num_candidates)
    draws = list(combinations(range(num_candidates), drawn))
    hits = sum(any(candidate < num_right for candidate in draw) for draw in draws)
    assert hit_chance(num_candidates, num_right, k) == pytest.approx(hits / len(draws))


def test_a_blind_model_reaches_chance():
    rng = np.random.default_rng(0)
    image_of_text = np.repeat(np.arange(30), 3)
    found = [measure(rng.random((30, 90)), image_of_text, num_resamples=2) for _ in range(300)]
    for name in found[0]:
        values = np.array([metrics[name].value for metrics in found])
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - found[0][name].chance) < 4 * error


def test_chance_of_mean_recall_is_the_mean_of_the_six():
    found = measure(np.random.default_rng(0).random((7, 12)), np.arange(12) % 7)
    six = [estimate.chance for name, estimate in found.items() if name != "mean_recall"]
    assert found["mean_recall"].chance == pytest.approx(np.mean(six))
    assert len(six) == 6


def test_intervals_hold_the_value_and_come_again_with_the_seed():
    scores = np.random.default_rng(0).random((50, 100)) + np.repeat(np.eye(50), 2, axis=1) * 0.4
    image_of_text = np.repeat(np.arange(50), 2)
    found = measure(scores, image_of_text, seed=1)
    assert all(e.low <= e.value <= e.high for e in found.values())
    assert found["mean_recall"].low < found["mean_recall"].high
    assert measure(scores, image_of_text, seed=1) == found
    assert measure(scores, image_of_text, seed=2) != found


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_says():
    # Diagonal scores: image i finds its text when the coin says so; one text an image.
    num = 400
    coins = np.random.default_rng(0).random(num) < 0.5
    scores = np.random.default_rng(1).random((num, num))
    scores[np.arange(num), np.arange(num)] = np.where(coins, 2.0, -1.0)
    found = measure(scores, np.arange(num), num_resamples=4000)["tr_r1"]
    deviation = (found.value * (1 - found.value) / num) ** 0.5
    # 1.96 deviations either way; the bootstrap's own noise is a few percent of that.
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * deviation, rel=0.1)


BOXES = np.array([[0.0, 0.0, 2.0, 2.0], [1.9, 1.0, 2.0, 1.5]])


def test_a_box_scores_the_heat_inside_over_the_root_of_its_area():
    heat = np.arange(12.0).reshape(3, 4)
    # Rows 0 and 1 of columns 0 and 1; row 1 (to 2.5, cut) of columns 1 and 2 (to 3.9, cut).
    assert box_scores(heat, BOXES).tolist() == pytest.approx([10 / 2, 11 / 3**0.5])
    assert box_scores(heat, BOXES, area_power=0.0).tolist() == [10, 11]
    assert box_scores(heat, BOXES, area_power=1.0).tolist() == pytest.approx([10 / 4, 11 / 3])


def test_a_box_beyond_the_picture_scores_what_is_in_it():
    heat = np.ones((3, 4))
    beyond = np.array([[-2.5, -1.0, 4.0, 2.0], [3.0, 2.0, 9.0, 9.0], [7.0, 0.0, 2.0, 2.0]])
    assert box_scores(heat, beyond, area_power=0.0).tolist() == [1, 1, 0]


@settings(deadline=None)
@given(box=arrays(np.float64, 4, elements=st.integers(1, 12).map(float)))
def test_a_box_overlaps_itself_wholly_and_a_far_one_not_at_all(box):
    far = box + np.array([50, 0, 0, 0])
    found = box_overlap(box, np.stack([box, far]))
    # The last pixel counts as inside, so a box one pixel thin has no inside at all.
    assert found.tolist() == [float(box[2] > 1 and box[3] > 1), 0]


@settings(deadline=None)
@given(boxes=arrays(np.float64, (2, 4), elements=st.integers(0, 9).map(lambda n: n + 1.5)))
def test_overlap_equals_a_slow_transcription(boxes):
    (ax, ay, aw, ah), (bx, by, bw, bh) = boxes.tolist()
    left, top = max(ax, bx), max(ay, by)
    right, bottom = min(ax + aw - 1, bx + bw - 1), min(ay + ah - 1, by + bh - 1)
    shared = 0.0
    if left < right and top < bottom:
        shared = (right - left + 1) * (bottom - top + 1)
    expected = shared / (aw * ah + bw * bh - shared)
    assert box_overlap(boxes[0], boxes[1:])[0] == pytest.approx(expected)


def test_pixels_of_several_boxes_are_marked_once():
    inside = inside_boxes(BOXES, height=3, width=4)
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert inside.astype(int).tolist() == expected
    assert inside.mean() == 5 / 12


@pytest.mark.parametrize(
    ("hot", "is_hit"), [([0], True), ([5], False), ([0, 1], True), ([0, 5], False)]
)
def test_the_pointing_game_wants_every_hottest_pixel_inside(hot, is_hit):
    inside = np.zeros((2, 3), dtype=bool)
    inside[0] = True
    heat = np.zeros((2, 3))
    heat.flat[hot] = 1.0
    assert points_inside(heat, inside) == is_hit


@pytest.mark.parametrize("heat", [0.0, np.nan])
def test_a_constant_map_wins_no_pointing_game(heat):
    inside = np.array([[True, False]])
    assert not points_inside(np.full((1, 2), heat), inside)


def test_energy_is_a_share_of_the_heat_above_zero():
    inside = np.array([[True, True, False]])
    assert energy_inside(np.array([[1.0, -5.0, 3.0]]), inside) == 0.25
    assert energy_inside(np.zeros((1, 3)), inside) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_blind_maps_reach_the_chance_level(seed):
    rng = np.random.default_rng(seed)
    inside = inside_boxes(np.array([[1.0, 1.0, 4.0, 3.0]]), height=6, width=8)
    heats = rng.random((600, 6, 8))
    pointed = np.mean([points_inside(heat, inside) for heat in heats])
    energy = np.mean([energy_inside(heat, inside) for heat in heats])
    chance = inside.mean()
    assert abs(pointed - chance) < 5 * (chance * (1 - chance) / len(heats)) ** 0.5
    assert energy == pytest.approx(chance, abs=0.02)


def test_a_mean_has_the_interval_of_its_pictures():
    values = np.repeat([0.0, 1.0], 50)
    rows = np.arange(100)
    found = mean_estimate(values, np.full(100, 0.2), rows, num_resamples=4000, seed=0)
    assert (found.value, found.chance) == (0.5, pytest.approx(0.2))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    # Ten questions about each of ten pictures, answered alike, are ten answers and no more.
    grouped = mean_estimate(values, np.full(100, 0.2), rows // 10, num_resamples=4000, seed=0)
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * 0.05 * 10**0.5, rel=0.1)


@needs_golden
def test_recalls_equal_the_official_evaluation():
    folder = GOLDEN / "retrieval" / "eval"
    tensors = load_file(folder / "tensors.safetensors")
    recorded = json.loads((folder / "metrics.json").read_text())
    image_to_text, text_to_image = tensors["rand_scores_i2t"], tensors["rand_scores_t2i"].T
    (name,) = [key for key in recorded if key.startswith("random_scores")]
    num_images, num_texts = image_to_text.shape
    found = retrieval_metrics(
        image_to_text,
        text_to_image,
        np.repeat(np.arange(num_images), num_texts // num_images),
        num_resamples=2,
        seed=0,
    )
    for k in (1, 5, 10):
        assert 100 * found[f"tr_r{k}"].value == pytest.approx(recorded[name][f"txt_r{k}"])
        assert 100 * found[f"ir_r{k}"].value == pytest.approx(recorded[name][f"img_r{k}"])
    assert 100 * found["mean_recall"].value == pytest.approx(recorded[name]["r_mean"])


@needs_golden
def test_ranks_equal_the_official_evaluation_where_it_has_one():
    folder = GOLDEN / "retrieval" / "eval"
    tensors = load_file(folder / "tensors.safetensors")
    recorded = json.loads((folder / "metrics.json").read_text())
    images = recorded["txt2img"]
    image_of_text = np.array([images[str(text)] for text in range(len(images))])
    for name, scores in tensors.items():
        if not name.startswith(("score_i2t_k", "score_t2i_k")):
            continue
        _, way, k = name.split("_")
        ranks = np.array(recorded[f"{k}_ranks_{way}"])
        if way == "i2t":
            found = image_to_text_ranks(scores, image_of_text)
        else:
            found = text_to_image_ranks(scores.T, image_of_text)
        np.testing.assert_array_equal(found[ranks >= 0], ranks[ranks >= 0])


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes", "yes"),
        (" A  red,\twooden chair. ", "red wooden chair"),
        ("the U.S.A.", "usa"),
        ("3.5 and .5", "3.5 and .5"),
        ("100,978", "100978"),
        ("1,000,000 or 2, 3", "1000000 or 2 3"),
        ("half-full/half_empty?", "half full half empty"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("Zero, ten, none, eleven", "0 10 0 eleven"),
        ("dont", "don't"),
        ("Its hell, whats left", "its hell what's left"),
        ("an", ""),
        ("someone", "someone"),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(answer, normalized):
    assert normalize_answer(answer) == normalized
    assert normalize_answer(normalized) == normalized


def test_three_who_agree_make_an_answer_right():
    annotators = ["red"] * 3 + ["blue"] * 2 + ["green"] + ["Black."] * 4
    for answer, hits in {"red": 3, "blue": 2, "green": 1, "a black": 4, "white": 0}.items():
        # Of the ten ways to leave one annotator out, `hits` leave one out who agrees.
        expected = (hits * min((hits - 1) / 3, 1) + (10 - hits) * min(hits / 3, 1)) / 10
        assert vqa_accuracies([answer], [annotators]) == pytest.approx(expected)
    # The well-known round figures: 0.3, 0.6, 0.9, 1.
    found = [vqa_accuracies([a], [annotators])[0] for a in ("green", "blue", "red", "black")]
    assert found == pytest.approx([0.3, 0.6, 0.9, 1.0])


@settings(deadline=None)
@given(
    answer=st.sampled_from(["a", "b", "c"]),
    annotators=st.lists(st.sampled_from(["b", "c", "d"]), min_size=10, max_size=10),
)
def test_vqa_accuracy_equals_a_slow_count(answer, annotators):
    total = 0.0
    for left_out in range(10):
        others = annotators[:left_out] + annotators[left_out + 1 :]
        total += min(sum(other == answer for other in others) / 3, 1)
    assert vqa_accuracies([answer], [annotators]) == pytest.approx(total / 10)


def test_every_question_has_a_score_of_its_own():
    found = vqa_accuracies(["2", "cat"], [["two"] * 10, ["dog"] * 9 + ["cat"]])
    assert found == pytest.approx([1, 0.3])


def test_an_exact_match_is_letter_by_letter():
    assert exact_matches(["yes", "Yes", "no"], ["yes", "yes", "yes"]).tolist() == [
        True,
        False,
        False,
    ]
    assert exact_matches([], []).tolist() == []


@needs_golden
def test_recalls_within_the_reranked_equal_the_official_evaluation():
    # Beyond the re-ranked ones the official recall depends on how a sort breaks its ties.
    folder = GOLDEN / "retrieval" / "eval"
    tensors = load_file(folder / "tensors.safetensors")
    recorded = json.loads((folder / "metrics.json").read_text())
    images = recorded["txt2img"]
    image_of_text = np.array([images[str(text)] for text in range(len(images))])
    compared = 0
    for name in tensors:
        if name.startswith("score_i2t_k"):
            depth = name.removeprefix("score_i2t_k")
            image_to_text, text_to_image = tensors[name], tensors[f"score_t2i_k{depth}"].T
            found = retrieval_metrics(
                image_to_text, text_to_image, image_of_text, num_resamples=2, seed=0
            )
            for k in (k for k in (1, 5, 10) if k <= int(depth)):
                official = recorded[f"k{depth}"]
                assert 100 * found[f"tr_r{k}"].value == pytest.approx(official[f"txt_r{k}"])
                assert 100 * found[f"ir_r{k}"].value == pytest.approx(official[f"img_r{k}"])
                compared += 1
    assert compared
