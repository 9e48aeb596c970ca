import dataclasses
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.metrics import box_overlap
from albef_core.model import ALBEF
from albef_core.preprocess import decode_image, resize_square
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model, save_model
from pipelines.config_file import read_config
from pipelines.evaluate_grounding import (
    CHOICE,
    ENERGY,
    POINTING,
    GroundingResult,
    choose_best,
    evaluate_grounding,
    score,
)
from pipelines.evaluation_config import EvaluateGroundingConfig
from pipelines.explain_report import grounding_table, sweep_table
from pipelines.expressions import Expression
from pipelines.grounder import Block, heat_maps, score_maps
from pipelines.manifest import read_manifest, read_rows
from tests.conftest import picture_row, write_corpus

NUM_IMAGES, BROKEN, EMPTY, NO_PROPOSALS = 13, 4, 7, 2
LEFT, RIGHT, WHOLE = [2.0, 4.0, 16.0, 30.0], [22.0, 4.0, 16.0, 30.0], [0.0, 0.0, 40.0, 40.0]
PROPOSALS = [LEFT, [23.0, 5.0, 14.0, 30.0], [0.0, 0.0, 3.0, 3.0]]


def row_of(number: int) -> dict[str, Any]:
    """A picture with two expressions, or the first of them empty, and mostly three proposals."""
    words = "?!" if number == EMPTY else "the red square"
    said: dict[str, Any] = {
        "objects": [
            {"box": LEFT, "expression": words},
            {"box": RIGHT, "expression": "the picture on the right side of it"},
            {"box": WHOLE, "category": "picture"},
        ]
    }
    if number != NO_PROPOSALS:
        said["proposals"] = [*PROPOSALS, [9.0, 9.0, 0.0, 0.0]]
    row = picture_row(number) | {"annotations": json.dumps(said)}
    return row | ({"image": row["image"][:200]} if number == BROKEN else {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "held out"
    rows = [row_of(number) for number in range(NUM_IMAGES)]
    write_corpus(folder, rows, rows_per_shard=20, rows_per_group=5)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    torch.manual_seed(0)
    tokenizer = Tokenizer.learn(["the red square", "picture on the right side of"], vocab_size=60)
    config = ModelConfig(
        image_size=32, patch_size=8, image_width=16, image_layers=2, image_heads=2,
        text_width=16, text_heads=2, text_mlp_width=32, text_layers=1, fusion_layers=2,
        vocab_size=tokenizer.vocab_size, max_positions=32, feature_size=8,
    )  # fmt: skip
    model = ALBEF(config)
    for parameter in (model.itm_head.weight, model.multimodal_encoder.layers[1].mlp.up.weight):
        parameter.data.normal_(std=0.5)  # or no heat would differ from rounding
    text = TextConfig()
    save_model(
        folder,
        model,
        model_config=config,
        text_config=text,
        recipe=Recipe(),
        tokenizer=tokenizer,
    )
    return folder


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, model: Path
) -> Iterator[EvaluateGroundingConfig]:
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
        yield EvaluateGroundingConfig(
            model=str(model),
            corpus=corpus,
            json=store / "out" / "result.json",
            sweep=True,
            batch_size=7,
            bootstrap=50,
            device="cpu",
        )


def looked_at(
    maps: list[list[tuple[int, int]]], expressions: list[Expression], is_shown: list[bool]
) -> Block:
    """Score maps of 4x4 patches, each hot in one patch a lens, on pictures of 40 x 40."""
    rows = []
    for spots, expression in zip(maps, expressions, strict=True):
        heat = np.zeros((len(spots), 4, 4), np.float32)
        for lens, spot in enumerate(spots):
            heat[lens][spot] = 1
        rows.append(score_maps(heat, expression, height=40, width=40))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return columns | {"is_shown": np.array(is_shown)}


def looking_for(box: list[float], proposals: list[list[float]]) -> Expression:
    return Expression(row=0, image_id="p", text="a dog", box=box, proposals=proposals)


def test_the_lens_that_is_hot_in_the_boxes_is_best() -> None:
    corner = [20.0, 20.0, 20.0, 20.0]
    expressions = [looking_for(corner, [])] * 2
    cold, hot = (0, 0), (3, 3)

    spots = [[cold, hot, cold], [hot, hot, cold]]
    scored = score(expressions, looked_at(spots, expressions, [True, True]))
    headline, means, best = choose_best(scored)

    assert (headline, best) == (POINTING, 1)
    assert means[POINTING].tolist() == [0.5, 1, 0]
    assert means[ENERGY] == pytest.approx([0.5, 1, 0], abs=0.01)
    assert scored[POINTING].chances.tolist() == [0.25, 0.25]
    assert CHOICE not in scored


def test_where_there_are_proposals_the_chosen_box_decides() -> None:
    corner, other = [20.0, 20.0, 20.0, 20.0], [0.0, 0.0, 20.0, 20.0]
    nearly = [19.0, 19.0, 20.0, 20.0]
    expressions = [looking_for(corner, [other, corner, nearly]), looking_for(other, [])]
    spots = [[(0, 0), (3, 3)], [(0, 0), (3, 3)]]

    scored = score(expressions, looked_at(spots, expressions, [True, True]))
    headline, means, best = choose_best(scored)

    assert (headline, best) == (CHOICE, 1)
    assert means[CHOICE].tolist() == [0, 1], "only the expression with proposals counts"
    assert means[POINTING].tolist() == [0.5, 0.5]
    assert scored[CHOICE].chances[0] == pytest.approx(2 / 3)


def test_a_picture_that_does_not_decode_counts_in_no_mean() -> None:
    corner = [20.0, 20.0, 20.0, 20.0]
    expressions = [looking_for(corner, [corner])] * 2

    scored = score(expressions, looked_at([[(3, 3)], [(0, 0)]], expressions, [True, False]))

    assert {name: means.tolist() for name, means in choose_best(scored)[1].items()} == {
        POINTING: [1],
        ENERGY: pytest.approx([1], abs=0.01),
        CHOICE: [1],
    }


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"layer": 1}, "--sweep and --layer 1 contradict each other"),
        ({"head": 0}, "--sweep and --head 0 contradict each other"),
        ({"sweep": False, "layer": -1}, "--layer is a count of at least 0, got -1"),
    ],
)
def test_impossible_flags_are_refused(
    flags: dict[str, Any], sentence: str, config: EvaluateGroundingConfig
) -> None:
    with pytest.raises(InputError, match=sentence):
        dataclasses.replace(config, **flags)


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(
    config: EvaluateGroundingConfig,
) -> None:
    with pytest.raises(InputError, match="--layer 2: by itm this model has layers 0 to 1"):
        evaluate_grounding(dataclasses.replace(config, sweep=False, layer=2))


@pytest.fixture(scope="module")
def heard() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def result(
    local_ray: None, config: EvaluateGroundingConfig, heard: list[tuple[str, int, int]]
) -> GroundingResult:
    return evaluate_grounding(config, on_progress=lambda *news: heard.append(news))


@pytest.mark.cluster
def test_every_expression_is_counted_in_order_and_what_is_left_out_is_named(
    result: GroundingResult, heard: list[tuple[str, int, int]]
) -> None:
    assert result.num_expressions == len(result.groundings) == 2 * NUM_IMAGES - 1 - 2
    assert result.num_images == NUM_IMAGES - 1
    assert result.num_undecodable == 2
    assert result.num_with_proposals == result.num_expressions - 2
    assert result.bad == {"an empty expression": 1, "a proposal without area": NUM_IMAGES - 1}
    ids = [one.image_id for one in result.groundings]
    assert ids == sorted(ids)
    total = 2 * NUM_IMAGES - 1
    assert heard == [("expressions", done, total) for done in (7, 14, 21, 25)]


@pytest.mark.cluster
def test_ray_changes_nothing_about_the_scores(
    result: GroundingResult, corpus: Path, model: Path
) -> None:
    loaded = load_model(model)
    loaded.model.eval()
    pictures = [image for (image,) in read_rows(read_manifest(corpus), ["image"])]
    for one in result.groundings:
        picture = decode_image(pictures[int(one.image_id.removeprefix("picture-"))])
        square = resize_square(picture, 32)[None].copy()
        maps = heat_maps(loaded, square, [one.expression], [result.lens])
        alone = looking_for(one.box, [] if one.chosen is None else PROPOSALS)
        expected = score_maps(maps[0], alone, height=40, width=40)
        assert one.energy == pytest.approx(expected["energy"][0], rel=1e-3, abs=1e-6)
        assert one.box_share == 16 * 30 / 40**2
        assert [one.points_inside] == expected["points"]
        if one.chosen is not None:
            assert one.chosen == alone.proposals[expected["choice"][0]]
            overlap = box_overlap(np.array(one.box), np.array([one.chosen]))[0]
            assert one.overlap == pytest.approx(overlap)


@pytest.mark.cluster
def test_the_metrics_are_means_of_the_expressions_with_interval_and_chance(
    result: GroundingResult,
) -> None:
    found, groundings = result.metrics, result.groundings
    assert found[POINTING].value == np.mean([one.points_inside for one in groundings])
    assert found[ENERGY].value == pytest.approx(np.mean([one.energy for one in groundings]))
    overlaps = [one.overlap for one in groundings if one.overlap is not None]
    assert found[CHOICE].value == np.mean(np.array(overlaps) >= 0.5)
    assert found[POINTING].chance == found[ENERGY].chance == pytest.approx(0.3)
    # Of three proposals one overlaps well: for LEFT itself, for RIGHT the one that is nearly it.
    assert found[CHOICE].chance == pytest.approx(1 / 3)
    assert all(one.low <= one.value <= one.high for one in found.values())
    assert set(result.slices) == {"short expression", "medium expression", "large box"}


@pytest.mark.cluster
def test_the_sweep_goes_on_with_its_best(result: GroundingResult) -> None:
    assert [(one.lens.layer, one.lens.head) for one in result.sweep] == [
        (layer, head) for layer in (0, 1) for head in (None, 0, 1)
    ]
    best = max(result.sweep, key=lambda one: one.scores[CHOICE])
    assert (result.headline, result.lens) == (CHOICE, best.lens)
    assert best.scores == {
        name: pytest.approx(found.value) for name, found in result.metrics.items()
    }
    console = Console(file=StringIO(), width=120)
    console.print(sweep_table(result), grounding_table(result))
    printed = console.file.getvalue()
    assert f"*{100 * best.scores[CHOICE]:.1f}" in printed
    assert str(result.lens) in printed
    assert "2 with a picture that does not decode" in printed


@pytest.mark.cluster
def test_everything_is_written_and_logged(
    result: GroundingResult, config: EvaluateGroundingConfig
) -> None:
    assert config.json is not None
    written = json.loads(config.json.read_text())
    assert written["metrics"][CHOICE] == dataclasses.asdict(result.metrics[CHOICE])
    assert len(written["groundings"]) == result.num_expressions
    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.data.metrics["eval/held_out/pointing_game"] == result.metrics[POINTING].value
    assert run.data.metrics["eval/held_out/box_accuracy_low"] == result.metrics[CHOICE].low
    assert run.info.status == "FINISHED"
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "eval" / "held_out"
    names = {path.name for path in folder.iterdir()}
    assert {"evaluate.json", "grounding.json", "grounding.png", "sweep.png"} <= names
    assert names & {"best.png", "worst.png"}
    assert read_config(folder / "evaluate.json", EvaluateGroundingConfig) == config
