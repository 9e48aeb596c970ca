from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from albef_core.api import Albef
from albef_core.errors import InputError
from albef_core.tokenizer import Tokenizer
from pipelines.config import ExplainConfig
from pipelines.explain import explain
from tests.conftest import SmallCorpus
from tests.pipelines.small_model import save_small_model

TEXT = "A red square, number 7."


@pytest.fixture(scope="module")
def small(make_corpus: Any) -> SmallCorpus:
    return make_corpus(9, broken=[1], uncaptioned=[3])


@pytest.fixture(scope="module")
def model(small: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    tokenizer = Tokenizer.load(small.tokenizer)
    save_small_model(folder, tokenizer, image_size=32, fusion_layers=2)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "dog.png"), pixels)
    return tmp_path / "dog.png"


def test_one_picture_is_explained_word_by_word_as_the_api_does(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "heat.png"

    result = explain(
        ExplainConfig(model=str(model), image=picture, text=TEXT, out=out, layer=1, head=0)
    )

    (one,) = result.explained
    (expected,) = Albef.load(model).explain([picture], [TEXT], layer=1, head=0)
    assert one.words == expected.words == ("a", "red", "square", "number", "7")
    np.testing.assert_array_equal(one.maps, expected.maps)
    assert one.match == expected.match
    with Image.open(out) as drawn:
        assert drawn.width > 1000


def test_a_page_has_the_first_pictures_that_can_be_shown_with_their_first_caption(
    model: Path, small: SmallCorpus, tmp_path: Path
) -> None:
    heard: list[tuple[str, int, int]] = []
    config = ExplainConfig(model=str(model), corpus=small.folder, num=3, out=tmp_path / "page.svg")

    result = explain(config, on_progress=lambda *news: heard.append(news))

    assert [one.name for one in result.explained] == ["picture-000", "picture-002", "picture-004"]
    assert all(one.text.startswith("A ") for one in result.explained)
    assert result.left_out == {"a picture that does not decode": 1, "no caption": 1}
    assert heard == [("pictures", done, 3) for done in (1, 2, 3)]
    assert "<svg" in config.out.read_text()


def test_a_page_is_no_longer_than_the_corpus(
    model: Path, small: SmallCorpus, tmp_path: Path
) -> None:
    config = ExplainConfig(model=str(model), corpus=small.folder, num=50, out=tmp_path / "a.png")

    assert len(explain(config).explained) == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": "?!"}, r"--text '\?!': cleaning leaves no word"),
        ({"image": Path(__file__)}, r"--image .*test_explain.py: cannot be decoded"),
        ({"model": "nowhere"}, "--model nowhere: no such file or folder"),
        ({"layer": 2}, "layer 2: the model has layers 0 to 1"),
        ({"head": 2}, "head 2: the model has heads 0 to 1"),
    ],
)
def test_a_mistake_is_one_line(
    change: dict[str, Any], sentence: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    flags = {"model": str(model), "image": picture, "text": TEXT, "out": tmp_path / "a.png"}

    with pytest.raises(InputError, match=sentence) as caught:
        explain(ExplainConfig(**(flags | change)))

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.png").exists()


def test_a_missing_picture_is_named(model: Path, tmp_path: Path) -> None:
    config = ExplainConfig(
        model=str(model), image=tmp_path / "gone.jpg", text=TEXT, out=tmp_path / "a.png"
    )

    with pytest.raises(FileNotFoundError) as caught:  # a line with exit code 2, in `run_job`
        explain(config)

    assert caught.value.filename == str(tmp_path / "gone.jpg")


def test_a_corpus_of_nothing_to_show_is_refused(
    model: Path, make_corpus: Any, tmp_path: Path
) -> None:
    empty = make_corpus(2, broken=[0], uncaptioned=[1])
    config = ExplainConfig(model=str(model), corpus=empty.folder, out=tmp_path / "a.png")

    with pytest.raises(InputError, match="none of its pictures decodes and has a caption"):
        explain(config)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "--image with --text is one picture, --corpus a page of them"),
        ({"image": Path("a"), "corpus": Path("c"), "text": "a"}, "give one of the two"),
        ({"image": Path("a")}, "--image and --text go together"),
        ({"corpus": Path("c"), "text": "a dog"}, "--image and --text go together"),
        ({"corpus": Path("c"), "num": 0}, "--num is a count of at least 1, got 0"),
        ({"corpus": Path("c"), "out": Path("a.jpg")}, r"a figure is a \.png, \.pdf or \.svg"),
    ],
)
def test_impossible_flags_are_refused(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ExplainConfig(**({"model": "m", "out": Path("a.png")} | flags))
