from io import BytesIO

import numpy as np
import pytest

from albef_core.metrics import Estimate
from pipelines.report import (
    METRICS,
    CaptionTarget,
    Curve,
    HardNegative,
    WordTarget,
    hard_negatives_figure,
    pseudo_targets_figure,
    recall_figure,
    training_curves_figure,
)

PICTURE = np.full((8, 8, 3), 90, dtype=np.uint8)


def drawn(figure):
    """All text in a figure, after it was really drawn (a warning would be an error)."""
    figure.savefig(BytesIO(), format="png")
    texts = [text.get_text() for panel in figure.axes for text in panel.texts]
    return " | ".join([*texts, *(panel.get_title() for panel in figure.axes)])


def negative(caption_match, image_match, caption="a dog"):
    return HardNegative(
        image=PICTURE,
        caption=caption,
        match=0.9,
        negative_caption="a cat",
        negative_caption_match=caption_match,
        negative_image=PICTURE,
        negative_image_match=image_match,
    )


def word(true_word, words):
    return WordTarget(
        image=PICTURE,
        masked_caption="a [MASK] runs",
        true_word=true_word,
        words=words,
        probabilities=[0.5, 0.25],
    )


def test_the_title_counts_the_negatives_that_itm_takes_for_matches():
    figure = hard_negatives_figure([negative(0.7, 0.2), negative(0.1, 0.6), negative(0.4, 0.5)])
    assert figure.get_suptitle() == "ITM takes 2 of 6 hard negatives for a match"
    text = drawn(figure)
    assert "text negative: 70.0 % match" in text
    assert "60.0 % match" in text
    assert "a dog" in text
    assert "a cat" in text


def test_captions_with_dollars_emoji_and_thousands_of_words_are_drawn():
    wild = "costs $5_^{ \\frac \N{PILE OF POO} \N{CJK UNIFIED IDEOGRAPH-4E2D}" + " word" * 5000
    text = drawn(hard_negatives_figure([negative(0.1, 0.1, caption=wild)]))
    assert "costs $5_^{ \\frac" in text
    assert len(text) < 1000


def test_the_title_says_how_often_the_teacher_is_right():
    words = [word("dog", ["dog", "cat"]), word("bird", ["dog", "cat"])]
    caption = CaptionTarget(
        image=PICTURE,
        true_caption="a dog runs",
        captions=["a cat", "a dog runs"],
        similarities=[0.5, -0.1],
    )
    figure = pseudo_targets_figure(words, [caption])
    assert figure.get_suptitle() == (
        "The teacher's best five hold the true word 1 of 2 times, the true caption 1 of 1 times"
    )
    text = drawn(figure)
    assert "a [MASK] runs" in text
    assert "50.0 %   dog" in text
    assert "-0.10   a dog runs" in text


@pytest.mark.parametrize("figure", [hard_negatives_figure([]), pseudo_targets_figure([], [])])
def test_nothing_to_show_is_an_empty_figure(figure):
    assert drawn(figure) == ""


def test_curves_are_smoothed_and_named_with_their_last_value():
    curves = {
        "train/loss": Curve(steps=[0, 10, 20, 30], values=[8.0, 6.0, 4.0, 2.0]),
        "train/alpha": Curve(steps=[5], values=[0.4]),
    }
    figure = training_curves_figure(curves)
    # The running mean reaches one point to each side: 7 at the start, 3 at the end.
    assert figure.get_suptitle() == "train/loss went from 7 to 3 in 30 steps"
    drawn(figure)
    assert [panel.get_title(loc="left") for panel in figure.axes][:2] == [
        "train/loss: 3",
        "train/alpha: 0.4",
    ]


def test_recall_is_compared_with_chance():
    metrics = {name: Estimate(value=0.4, low=0.35, high=0.45, chance=0.02) for name in METRICS}
    figure = recall_figure({"itc": metrics, "itm": metrics})
    assert figure.get_suptitle() == ("Mean recall is 40.0 % (35.0 % to 45.0 %), 20.0 times chance")
    assert drawn(figure).count("40.0") == 2 * len(METRICS)
