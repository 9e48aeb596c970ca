import numpy as np
import pytest
import torch

from albef_core.batch import normalize
from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tasks.grounding import itc_looks, itc_maps, itm_looks, itm_maps
from albef_core.tokenizer import Tokenizer
from albef_core.weights import LoadedModel, WeightsReport
from pipelines.expressions import Expression
from pipelines.grounder import NO_CHOICE, Lens, choose_lenses, heat_maps, score_maps

TEXTS = ["A red square!", "the big blue circle on the left", "green"]
TOKENIZER = Tokenizer.learn(TEXTS, vocab_size=60)
SIZES = ModelConfig(
    image_size=32, patch_size=8, image_width=16, image_layers=2, image_heads=2,
    text_width=24, text_heads=3, text_mlp_width=32, text_layers=1, fusion_layers=4,
    vocab_size=TOKENIZER.vocab_size, max_positions=32, feature_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    model = ALBEF(SIZES).eval()
    for name, parameter in model.named_parameters():
        if name != "temperature":  # larger than a fresh model's, so that words differ
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return LoadedModel(
        model=model,
        model_config=SIZES,
        text_config=TextConfig(max_tokens=12),
        recipe=Recipe(),
        tokenizer=TOKENIZER,
        report=WeightsReport(source="test", matched=0),
    )


def looking_for(box: list[float], proposals: list[list[float]] | None = None) -> Expression:
    return Expression(row=0, image_id="p", text="a dog", box=box, proposals=proposals or [])


def hot(*patches: tuple[int, int]) -> np.ndarray:
    """One map of 4x4 patches, hot in some of them, of one lens."""
    maps = np.zeros((1, 4, 4), np.float32)
    for row, column in patches:
        maps[0, row, column] = 1
    return maps


def test_heat_in_the_box_scores_1_and_heat_elsewhere_0() -> None:
    # 4 patches of 20 x 10 pixels a row and a column: the box is the lower right quarter.
    expression = looking_for([40, 20, 40, 20])

    inside = score_maps(hot((3, 3)), expression, height=40, width=80)
    outside = score_maps(hot((0, 0)), expression, height=40, width=80)

    assert (inside["points"], outside["points"]) == ([True], [False])
    # Where both of its sides dip below 0, bicubic resizing leaves a little heat.
    assert inside["energy"] == [pytest.approx(1, abs=0.01)]
    assert outside["energy"] == [pytest.approx(0, abs=0.01)]


def test_the_chance_is_the_box_s_share_of_the_picture_which_even_heat_reaches() -> None:
    even = np.ones((1, 4, 4), np.float32)

    found = score_maps(even, looking_for([40, 20, 40, 20]), height=40, width=80)

    assert found["box_share"] == 0.25
    assert found["energy"] == [pytest.approx(0.25, rel=1e-5)]
    assert found["points"] == [False], "a map that is hot everywhere points nowhere"


def test_the_proposal_with_the_most_heat_for_its_area_is_chosen() -> None:
    box = [60.0, 30.0, 20.0, 10.0]
    proposals = [[0.0, 0.0, 80.0, 40.0], [0.0, 0.0, 20.0, 10.0], [58.0, 30.0, 20.0, 10.0]]

    found = score_maps(hot((3, 3)), looking_for(box, proposals), height=40, width=80)

    assert found["choice"] == [2]
    assert found["overlap"] == [pytest.approx(180 / 220)]


def test_without_proposals_there_is_no_choice() -> None:
    found = score_maps(hot((3, 3)), looking_for([0, 0, 20, 10]), height=40, width=80)

    assert (found["choice"], found["overlap"]) == ([NO_CHOICE], [0.0])


@pytest.mark.parametrize("by", ["itm", "itc"])
def test_every_lens_of_a_sweep_gives_the_map_that_it_gives_alone(
    by: str, loaded: LoadedModel
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    lenses = choose_lenses(SIZES, by=by, sweep=True)  # type: ignore[arg-type]

    maps = heat_maps(loaded, pictures, TEXTS, lenses)

    assert maps.shape == (3, len(lenses), 4, 4)
    pixels = normalize(torch.from_numpy(pictures))
    ids = TOKENIZER.encode(["a red square", *TEXTS[1:]], max_tokens=12, keep_sep=True)
    token_ids = torch.from_numpy(ids)
    mask = token_ids != TOKENIZER.pad_id
    for place, lens in enumerate(lenses):
        looks = itm_looks if by == "itm" else itc_looks
        (look,), _ = looks(loaded.model, pixels, token_ids, mask, layers=[lens.layer])
        alone = (
            itm_maps(look, mask, head=lens.head) if by == "itm" else itc_maps(look, head=lens.head)
        )
        np.testing.assert_allclose(maps[:, place], alone.numpy(), rtol=1e-4, atol=1e-7)
    assert len({maps[0, place].tobytes() for place in range(len(lenses))}) == len(lenses)


def test_a_sweep_takes_every_layer_with_every_head_and_their_mean() -> None:
    lenses = choose_lenses(SIZES, by="itc", sweep=True)

    assert [(one.layer, one.head) for one in lenses] == [
        (layer, head) for layer in (0, 1) for head in (None, 0, 1)
    ]


@pytest.mark.parametrize(("by", "layer"), [("itm", 1), ("itc", 1)])
def test_the_default_is_the_lower_half_s_last_layer_by_itm_and_the_last_by_itc(
    by: str, layer: int
) -> None:
    assert choose_lenses(SIZES, by=by) == [Lens(by=by, layer=layer)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"by": "itm", "layer": 4}, "--layer 4: by itm this model has layers 0 to 3"),
        ({"by": "itc", "layer": 2}, "--layer 2: by itc this model has layers 0 to 1"),
        ({"by": "itc", "head": 2}, "--head 2: by itc this model has heads 0 to 1"),
    ],
)
def test_a_layer_or_head_that_the_model_lacks_is_refused(asked: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_lenses(SIZES, **asked)
