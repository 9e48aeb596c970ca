import json
from collections import Counter

import cv2
import numpy as np
import pytest

from pipelines.shapes import shapes_picture, true_captions
from pipelines.shapes_grammar import EXTRA_WORDS, compare
from pipelines.shapes_scene import (
    COLORS,
    DIRECTIONS,
    OUTLINES,
    Dice,
    Relation,
    Scene,
    Thing,
    draw,
    throw_scene,
)

RING = Thing("red", "ring", "large", 26.0, 48.0, 18.0, 1.0)
SQUARE = Thing("blue", "square", "small", 70.0, 48.0, 11.0, 1.0)
PAIR = Scene((RING, SQUARE), (Relation(0, "left of", 1),), "", "white", 1.0)
SINGLE = Scene((RING,), (), "on the left", "black", 1.0)


def truth(index: int, **noise: float) -> dict:
    return json.loads(shapes_picture(0, index, **noise).annotations)


def test_the_same_seed_and_index_make_the_same_picture():
    assert shapes_picture(3, 17) == shapes_picture(3, 17)


def test_seeds_differ():
    assert not {shapes_picture(0, i).encoded for i in range(50)} & {
        shapes_picture(1, i).encoded for i in range(50)
    }


def test_noise_changes_neither_picture_nor_truth():
    clean, noisy = shapes_picture(0, 5), shapes_picture(0, 5, wrong_captions=1.0, extra_words=1.0)
    assert noisy.encoded == clean.encoded
    assert json.loads(noisy.annotations)["captions"] == clean.captions
    assert noisy.captions != clean.captions


def test_ids_name_seed_and_index():
    assert shapes_picture(4, 12).image_id == "shapes-4:0000012"


@pytest.mark.parametrize("seed", [0, 1])
def test_few_of_500_pictures_share_their_captions_with_another(seed):
    captions = [frozenset(true_captions(seed, i)) for i in range(500)]
    seen = Counter(caption for texts in captions for caption in texts)
    shared = [texts for texts in captions if all(seen[caption] > 1 for caption in texts)]
    assert len(shared) < 0.02 * 500


def test_training_and_held_out_sets_seldom_show_the_same():
    trained = {caption for i in range(2000) for caption in true_captions(0, i)}
    known = [set(true_captions(1, i)) <= trained for i in range(500)]
    assert sum(known) < 0.02 * 500


@pytest.mark.parametrize("index", range(40))
def test_boxes_hold_the_shape_tightly(index):
    scene = throw_scene(0, index)
    for thing in scene.things:
        alone = draw(Scene((thing,), (), "", "black", 1.0)).astype(int)
        rows, columns = np.nonzero(np.abs(alone - alone[0, 0]).max(axis=2) > 60)
        x, y, width, height = thing.box
        assert x >= 0 <= y
        assert max(x + width, y + height) <= 96
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(found, (x, y, x + width, y + height))).max() <= 1


@pytest.mark.parametrize("index", range(60))
def test_relations_hold_between_the_boxes(index):
    scene = throw_scene(0, index)
    for fact in scene.relations:
        first, second = scene.things[fact.subject], scene.things[fact.object]
        if fact.name in DIRECTIONS:
            axis = 0 if fact.name in ("left of", "right of") else 1
            low, high = (first, second) if fact.name in ("left of", "above") else (second, first)
            assert low.box[axis] + low.box[axis + 2] <= high.box[axis] + 2
        else:
            x, y, width, height = first.box
            left, top, outer_width, outer_height = second.box
            assert left < x
            assert top < y
            assert x + width < left + outer_width
            assert y + height < top + outer_height


@pytest.mark.parametrize("index", range(20))
def test_no_two_things_of_a_scene_share_color_or_shape(index):
    things = throw_scene(0, index).things
    assert len({thing.color for thing in things}) == len({thing.shape for thing in things})
    assert len({thing.shape for thing in things}) == len(things)


@pytest.mark.parametrize("color", list(COLORS))
def test_the_middle_of_a_shape_has_its_color(color):
    thing = Thing(color, "square", "large", 48.0, 48.0, 18.0, 1.0)
    pixel = draw(Scene((thing,), (), "", "gray", 1.0))[48, 48]
    np.testing.assert_array_equal(pixel, COLORS[color])


def test_the_encoded_picture_is_the_drawing():
    decoded = cv2.imdecode(np.frombuffer(shapes_picture(0, 8).encoded, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded[..., ::-1], draw(throw_scene(0, 8)))


@pytest.mark.parametrize("index", range(20))
def test_every_caption_names_every_color_and_shape(index):
    for caption in true_captions(0, index):
        for thing in throw_scene(0, index).things:
            assert thing.color in caption
            assert thing.shape in caption


def test_shares_of_noise_are_met():
    truths = [truth(i, wrong_captions=0.3, extra_words=0.2) for i in range(400)]
    wrong = np.mean([one["caption_is_wrong"] for one in truths])
    extra = np.mean([flag for one in truths for flag in one["has_extra_words"]])
    # Four standard errors of 400 and 1,200 throws.
    assert abs(wrong - 0.3) < 0.092
    assert abs(extra - 0.2) < 0.047


def test_without_noise_the_captions_are_the_true_ones():
    picture = shapes_picture(0, 9)
    assert json.loads(picture.annotations)["captions"] == picture.captions
    assert not json.loads(picture.annotations)["caption_is_wrong"]


def test_what_a_small_share_spoils_a_larger_one_spoils_too():
    small = {i for i in range(200) if truth(i, wrong_captions=0.1)["caption_is_wrong"]}
    large = {i for i in range(200) if truth(i, wrong_captions=0.4)["caption_is_wrong"]}
    assert small < large


def test_extra_words_are_marked_and_come_from_the_list():
    picture = shapes_picture(0, 3, extra_words=0.5)
    flags = json.loads(picture.annotations)["has_extra_words"]
    found = [any(words in text for words in EXTRA_WORDS) for text in picture.captions]
    assert found == flags


def test_questions_of_a_picture_with_three_things_are_answered_from_its_objects():
    index = next(i for i in range(50) if len(throw_scene(0, i).things) == 3)
    told = truth(index)
    answers = {entry["question"]: entry["answers"][0] for entry in told["questions"]}
    assert answers["how many shapes are there?"] == "three"
    assert answers["what is the background like?"] == told["background"]
    for thing in told["objects"]:
        asked = f"what color is the {thing['shape']}?"
        assert answers.get(asked, thing["color"]) == thing["color"]


def test_answers_to_yes_no_questions_are_balanced():
    answers = Counter(
        entry["answers"][0]
        for i in range(300)
        for entry in truth(i)["questions"]
        if entry["answer_type"] == "yes/no"
    )
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.08


def test_each_label_of_entailment_has_two_sentences():
    labels = Counter(entry["label"] for entry in truth(6)["entailment"])
    assert labels == {"entailment": 2, "contradiction": 2, "neutral": 2}


def test_contradictions_of_a_pair_are_false_in_it():
    told = [entry for i in range(200) for entry in truth(i)["entailment"]]
    true_and_false = {"entailment", "contradiction"}
    assert true_and_false < {entry["label"] for entry in told}
    for i in range(200):
        one = truth(i)
        names = {f"{thing['color']} {thing['shape']}" for thing in one["objects"]}
        for entry in one["entailment"]:
            sentence = entry["sentence"]
            if not sentence.startswith("there is a") or entry["label"] not in true_and_false:
                continue
            name = sentence.removeprefix("there is a").removeprefix("n").strip()
            if name.split()[-1] in OUTLINES and len(name.split()) == 2:
                assert (name in names) == (entry["label"] == "entailment")


def test_statements_on_a_pair_are_true_or_false_as_labeled():
    known = {
        "there is a ring in both images": True,
        "exactly one image shows a ring": False,
        "exactly one image shows a square": True,
        "the right image shows a square": False,
        "something red is in both images": True,
        "something blue is in both images": False,
        "the left image shows more shapes than the right one": True,
        "both backgrounds are alike": False,
        "the images show 3 shapes in total": True,
        "the images show 4 shapes in total": False,
    }
    told = {
        entry["sentence"]: entry["label"]
        for i in range(300)
        for entry in compare(PAIR, SINGLE, Dice(0, i, 3))
    }
    assert {sentence: told[sentence] for sentence in known} == known


def test_pairs_join_the_picture_before():
    assert "pairs" not in truth(0)
    assert [entry["left"] for entry in truth(7)["pairs"]] == ["shapes-0:0000006"] * 2
