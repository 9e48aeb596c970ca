"""Weakly supervised grounding: does a model's heat lie where an expression's box is?"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albef_core.captions import length_name
from albef_core.errors import InputError
from albef_core.metrics import RIGHT_IOU, Estimate, box_overlap, mean_estimate
from albef_core.preprocess import decode_image, resize_square
from albef_core.weights import LoadedModel, load_model
from pipelines import tracking
from pipelines.annotations import Box
from pipelines.cluster import check_actors, pick_device
from pipelines.config_file import write_config
from pipelines.evaluation_config import EvaluateGroundingConfig
from pipelines.explain_report import Found, found_figure, grounding_figure, sweep_figure
from pipelines.expressions import Expression, collect_expressions
from pipelines.grounder import (
    Block,
    Lens,
    choose_lenses,
    grounded_blocks,
    heat_maps,
)
from pipelines.manifest import read_manifest
from pipelines.model_store import find_model, is_model_uri
from pipelines.pairs import open_corpus
from pipelines.pictures import DECODE_CPUS
from pipelines.row_scores import example_rows, log_rows, subject_of

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all."""
POINTING, ENERGY, CHOICE = "pointing_game", "energy_in_box", "box_accuracy"
NUM_CASES = 6
SMALL_BOX, MEDIUM_BOX = 0.05, 0.2
"""Shares of the picture up to which a box is small, and medium."""


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """One expression, and where the model looked for it."""

    image_id: str
    expression: str
    box: Box
    box_share: float
    """Of the picture: what blind pointing reaches."""
    points_inside: bool
    """The hottest pixel lies in the box."""
    energy: float
    """Share of the heat in the box."""
    chosen: Box | None
    """The proposal with the highest score; None: there are no proposals."""
    overlap: float | None
    """Its intersection over union with the box."""


@dataclass(frozen=True, kw_only=True)
class LensScore:
    """What one place in the model reaches."""

    lens: Lens
    scores: dict[str, float]
    """Means by the names of `GroundingResult.metrics`."""


@dataclass(frozen=True, kw_only=True)
class GroundingResult:
    """All that an evaluation found, as it is written with `--json`; scores are shares of 1."""

    model: str
    corpus: str
    corpus_id: str
    lens: Lens
    """Which attention the numbers below are of."""
    headline: str
    """The metric that chooses in a sweep: that of boxes where there are proposals."""
    metrics: dict[str, Estimate]
    """`pointing_game`, `energy_in_box`, and where there are proposals `box_accuracy`; the chance of
    the first two is the box's share of the picture, of the last the share of right proposals."""
    slices: dict[str, Estimate]
    """The headline's, by length of the expression and size of the box."""
    sweep: tuple[LensScore, ...]
    """Every layer and head; empty without `--sweep`."""
    num_expressions: int
    num_images: int
    num_with_proposals: int
    num_undecodable: int
    """Expressions left out, because their picture does not decode."""
    bad: dict[str, int]
    """Annotations left out, by class."""
    seconds: float
    tracking_uri: str
    run_id: str
    groundings: tuple[Grounding, ...]


def evaluate_grounding(
    config: EvaluateGroundingConfig, *, on_progress: OnProgress = lambda *_: None
) -> GroundingResult:
    """Look for every expression of a corpus by Grad-CAM (ALBEF section 4); Ray must be connected.

    Raises:
        InputError: model or corpus is absent, damaged or of another task, or nothing can be scored.
    """
    started = time.monotonic()
    manifest, folder = read_manifest(config.corpus), find_model("--model", config.model)
    loaded = load_model(folder)
    lenses = choose_lenses(
        loaded.model_config,
        by=config.by,
        layer=config.layer,
        head=config.head,
        sweep=config.sweep,
    )
    expressions, bad = collect_expressions(manifest, max_words=loaded.text_config.max_words)
    blocks = _ground(config, folder, loaded, expressions, lenses, on_progress)
    scored = score(expressions, blocks)
    is_shown = blocks["is_shown"]
    if not is_shown.any():
        raise InputError(f"{config.corpus}: no picture decodes. Evaluate on another corpus.")
    headline, means, best = choose_best(scored)
    rows = np.array([expression.row for expression in expressions])

    def estimate(name: str, mask: NDArray[np.bool_]) -> Estimate:
        one = scored[name]
        return mean_estimate(
            one.values[mask, best],
            one.chances[mask],
            rows[mask],
            num_resamples=config.bootstrap,
            seed=config.seed,
        )

    names = [
        _slices_of(one, share) for one, share in zip(expressions, blocks["box_share"], strict=True)
    ]
    name = tracking.metric_name(config.corpus.resolve().name)
    run, is_new = tracking.run_of_model(
        folder,
        config.experiment,
        run_name=f"grounding-{name}",
        params=config,
        tags={"corpus.id": manifest.content_id, "model": config.model, "seed": str(config.seed)},
    )
    result = GroundingResult(
        model=config.model,
        corpus=str(config.corpus),
        corpus_id=manifest.content_id,
        lens=lenses[best],
        headline=headline,
        metrics={name: estimate(name, one.is_counted) for name, one in scored.items()},
        slices={
            name: estimate(headline, mask)
            for name in sorted({name for both in names for name in both})
            if (
                mask := scored[headline].is_counted & np.array([name in both for both in names])
            ).any()
        },
        sweep=tuple(
            LensScore(lens=lens, scores={name: float(mean[n]) for name, mean in means.items()})
            for n, lens in enumerate(lenses)
            if config.sweep
        ),
        num_expressions=int(is_shown.sum()),
        num_images=len(np.unique(rows[is_shown])),
        num_with_proposals=int(scored[CHOICE].is_counted.sum()) if CHOICE in scored else 0,
        num_undecodable=int((~is_shown).sum()),
        bad=bad,
        seconds=round(time.monotonic() - started, 1),
        tracking_uri=run.uri,
        run_id=run.run_id,
        groundings=tuple(
            _grounding(expressions[n], {name: blocks[name][n] for name in blocks}, best)
            for n in np.flatnonzero(is_shown)
        ),
    )
    shown = [expressions[n] for n in np.flatnonzero(is_shown)]
    rows = example_rows(
        {
            name: np.where(one.is_counted, one.values[:, best], np.nan)[is_shown]
            for name, one in scored.items()
        },
        [expression.image_id for expression in shown],
        np.flatnonzero(is_shown),
    )
    subject = subject_of("grounding", config, model=folder, corpus_id=manifest.content_id)
    with tracking.findings(run, is_new=is_new) as tracker:
        log_rows(tracker, rows, subject)
        _log(result, config, tracker, cases=_cases(result, config, loaded, shown))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One metric of N expressions by C lenses."""

    values: NDArray[np.floating]
    """(N, C)."""
    chances: NDArray[np.floating]
    """What a blind guess would reach in each (N)."""
    is_counted: NDArray[np.bool_]
    """False where the picture does not decode or has no proposals (N)."""


def score(expressions: Sequence[Expression], blocks: Block) -> dict[str, Scored]:
    """Make metrics of what `grounded_blocks` gave; that of boxes only where there are proposals.

    A chosen box is right from an overlap of 0.5 on, the protocol of RefCOCO+.
    """
    is_shown, shares = blocks["is_shown"], blocks["box_share"].astype(float)
    scored = {
        POINTING: Scored(values=blocks["points"] * 1.0, chances=shares, is_counted=is_shown),
        ENERGY: Scored(values=blocks["energy"] * 1.0, chances=shares, is_counted=is_shown),
    }
    has_choice = is_shown & np.array([bool(one.proposals) for one in expressions])
    if has_choice.any():
        scored[CHOICE] = Scored(
            values=(blocks["overlap"] >= RIGHT_IOU) * 1.0,
            chances=np.array([_blind_choice(one) for one in expressions]),
            is_counted=has_choice,
        )
    return scored


def choose_best(
    scored: Mapping[str, Scored],
) -> tuple[str, dict[str, NDArray[np.floating]], int]:
    """Give the metric that decides, the means of all by lens, and the number of the best lens.

    Boxes decide where there are proposals, else the pointing game; the first of equals is best.
    """
    headline = CHOICE if CHOICE in scored else POINTING
    means = {name: one.values[one.is_counted].mean(axis=0) for name, one in scored.items()}
    return headline, means, int(means[headline].argmax())


def _blind_choice(expression: Expression) -> float:
    if not expression.proposals:
        return 0.0
    proposals = np.array(expression.proposals, float)
    return float((box_overlap(np.array(expression.box, float), proposals) >= RIGHT_IOU).mean())


def _ground(
    config: EvaluateGroundingConfig,
    folder: Path,
    loaded: LoadedModel,
    expressions: Sequence[Expression],
    lenses: Sequence[Lens],
    on_progress: OnProgress,
) -> Block:
    """Look for all expressions, checked to come whole and in order; one array a column."""
    device = pick_device(config.device)
    check_actors(config.actors, device, cpus_left=DECODE_CPUS)
    blocks: list[Block] = []
    for block in grounded_blocks(
        expressions,
        corpus=config.corpus.absolute(),
        model=folder,
        image_size=loaded.model_config.image_size,
        lenses=lenses,
        batch_size=config.batch_size,
        actors=config.actors,
        on_gpu=device == "cuda",
    ):
        blocks.append(block)
        on_progress("expressions", int(block["number"][-1]) + 1, len(expressions))
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    numbers = columns.pop("number").tolist()
    assert numbers == list(range(len(expressions))), "every expression once, in order"
    return columns


def _grounding(expression: Expression, scores: Mapping[str, Any], best: int) -> Grounding:
    has_choice = bool(expression.proposals)
    return Grounding(
        image_id=expression.image_id,
        expression=expression.text,
        box=expression.box,
        box_share=float(scores["box_share"]),
        points_inside=bool(scores["points"][best]),
        energy=float(scores["energy"][best]),
        chosen=expression.proposals[int(scores["choice"][best])] if has_choice else None,
        overlap=float(scores["overlap"][best]) if has_choice else None,
    )


def _slices_of(expression: Expression, box_share: float) -> tuple[str, str]:
    size = "small" if box_share <= SMALL_BOX else "medium" if box_share <= MEDIUM_BOX else "large"
    return f"{length_name(expression.text)} expression", f"{size} box"


def _cases(
    result: GroundingResult,
    config: EvaluateGroundingConfig,
    loaded: LoadedModel,
    expressions: Sequence[Expression],
) -> dict[str, list[Found]]:
    """Draw on the expressions whose heat is most, and least, in the box beyond its share."""
    loaded.model.eval()
    corpus = open_corpus(config.corpus.absolute())
    places = sorted(
        range(len(expressions)),
        key=lambda n: result.groundings[n].energy - result.groundings[n].box_share,
    )
    hits = [n for n in reversed(places) if result.groundings[n].points_inside]
    misses = [n for n in places if not result.groundings[n].points_inside]

    def look(place: int) -> Found:
        expression, seen = expressions[place], result.groundings[place]
        picture = decode_image(corpus.read(expression.row).image)
        square = resize_square(picture, loaded.model_config.image_size)
        maps = heat_maps(loaded, square[None].copy(), [expression.text], [result.lens])
        return Found(
            image=picture,
            heat=maps[0, 0],
            expression=expression.text,
            box=expression.box,
            chosen=seen.chosen,
            energy=seen.energy,
            box_share=seen.box_share,
        )

    return {
        name: [look(place) for place in some[:NUM_CASES]]
        for name, some in (("best", hits), ("worst", misses))
    }


def _log(
    result: GroundingResult,
    config: EvaluateGroundingConfig,
    tracker: tracking.Tracker,
    *,
    cases: Mapping[str, Sequence[Found]],
) -> None:
    folder = f"eval/{tracking.metric_name(config.corpus.resolve().name)}"
    points: dict[str, float] = {}
    for name, estimate in result.metrics.items():
        points[f"{folder}/{name}"] = estimate.value
        points[f"{folder}/{name}_low"] = estimate.low
        points[f"{folder}/{name}_high"] = estimate.high
        points[f"{folder}/{name}_chance"] = estimate.chance
    tracker.log(points, step=0)
    tracker.log_dict(asdict(result), f"{folder}/grounding.json")
    model = config.model if is_model_uri(config.model) else str(Path(config.model).absolute())
    with tempfile.TemporaryDirectory(prefix="albef-evaluate-") as scratch:
        absolute = replace(config, model=model, corpus=config.corpus.absolute())
        write_config(absolute, Path(scratch) / "evaluate.json")
        tracker.log_artifact(Path(scratch) / "evaluate.json", f"{folder}/evaluate.json")
    tracker.log_figure(grounding_figure(result), f"{folder}/grounding.png")
    if result.sweep:
        tracker.log_figure(sweep_figure(result), f"{folder}/sweep.png")
    for name, found in cases.items():
        if found:
            tracker.log_figure(found_figure(name, found), f"{folder}/{name}.png")
