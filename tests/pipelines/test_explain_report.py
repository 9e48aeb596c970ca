from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipelines.explain_report import MAX_SIDE, Explained, Found, found_figure, shrink, words_figure

PICTURE = np.full((30, 40, 3), 90, dtype=np.uint8)


def drawn(figure: Figure) -> list[str]:
    """The titles of all panels that have one, after the figure was really drawn."""
    figure.savefig(BytesIO(), format="png")
    return [panel.get_title() for panel in figure.axes if panel.get_title()]


def explained(words: list[str], *, match: float = 0.9) -> Explained:
    maps = np.random.default_rng(0).random((len(words), 4, 4)).astype(np.float32)
    text = " ".join(words)
    return Explained(image=PICTURE, name="p", text=text, words=words, maps=maps, match=match)


def test_each_word_has_a_panel_with_its_heat_over_the_picture() -> None:
    figure = words_figure([explained(["a", "red", "square"], match=0.973)])

    assert figure.get_suptitle() == "Picture and text match with 97.3 %: a red square"
    assert drawn(figure) == ["match: 97.3 %", "a", "red", "square"]
    heat = figure.axes[1].get_images()[1].get_array()
    assert heat.shape == (4, 4)
    assert heat.max() == 1


def test_a_long_text_goes_on_below_and_the_next_picture_starts_a_line() -> None:
    words = [f"word{number}" for number in range(8)]

    figure = words_figure([explained(words), explained(["one"], match=0.2)])

    assert figure.get_suptitle() == "ITM takes 1 of 2 pictures and their captions for a match"
    assert drawn(figure) == ["match: 90.0 %", *words, "match: 20.0 %", "one"]
    columns = [panel.get_subplotspec().colspan.start for panel in figure.axes if panel.get_title()]
    assert columns == [0, 1, 2, 3, 4, 5, 6, 1, 2, 0, 1]


@pytest.mark.parametrize("word", ["$5_^{", "\N{PILE OF POO}", "x" * 300])
def test_any_word_is_drawn(word: str) -> None:
    assert len(drawn(words_figure([explained([word])]))) == 2


def test_a_word_without_heat_leaves_the_picture_as_it_is() -> None:
    cold = Explained(
        image=PICTURE,
        name="p",
        text="the",
        words=["the"],
        maps=np.zeros((1, 4, 4), np.float32),
        match=0.5,
    )

    drawn(words_figure([cold]))


@pytest.mark.parametrize("name", ["best", "worst"])
def test_cases_show_box_and_chosen_proposal_in_pixels_of_the_picture(name: str) -> None:
    case = Found(
        image=PICTURE,
        heat=np.eye(4, dtype=np.float32),
        expression="the dog on the left",
        box=[1, 2, 10, 20],
        chosen=[5, 6, 7, 8],
        energy=0.5,
        box_share=0.25,
    )

    figure = found_figure(name, [case] * 4)

    shares = "50.0 % of the heat in 25.0 % of the picture"
    assert drawn(figure) == [f"the dog on the left\n{shares}"] * 4
    boxes = [patch.get_bbox().bounds for patch in figure.axes[0].patches]
    assert set(boxes) == {(1, 2, 10, 20), (5, 6, 7, 8)}
    assert figure.axes[0].get_images()[1].get_extent() == [0, 40, 30, 0]


def test_a_photograph_is_shown_small_and_in_its_shape() -> None:
    assert shrink(np.zeros((1200, 2400, 3), np.uint8)).shape == (MAX_SIDE // 2, MAX_SIDE, 3)
    assert shrink(PICTURE).shape == PICTURE.shape
