"""Figures and tables of heat maps: pictures with their heat in, a Figure or a Table out."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.table import Table
from rich.text import Text

from albef_core.metrics import Estimate
from pipelines.annotations import Box
from pipelines.report import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    drawable,
    estimates_figure,
    interval,
    panel_rows,
    percent,
)

if TYPE_CHECKING:
    from pipelines.evaluate_grounding import GroundingResult

WORD_COLUMNS, CASE_COLUMNS = 7, 3
PANEL_INCHES = 1.6
MAX_SIDE = 400
"""Pixels of a picture's longer side in a figure."""
PALEST, STRONGEST = 0.5, 0.7
"""How much the coldest and the hottest patch cover of the picture."""
METRIC_NAMES = {
    "pointing_game": "pointing game",
    "energy_in_box": "heat in the box",
    "box_accuracy": "box choice at IoU 0.5",
}


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One picture, and where the model finds each word of a text."""

    image: UInt8[np.ndarray, "H W 3"]
    name: str
    """Its file or id."""
    text: str
    words: Sequence[str]
    maps: Float[np.ndarray, "N G G"]
    """Heat of each patch for each word."""
    match: float
    """ITM's probability that picture and text belong together."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One expression, where the model looked for it, and where it is."""

    image: UInt8[np.ndarray, "H W 3"]
    heat: Float[np.ndarray, "G G"]
    expression: str
    box: Box
    chosen: Box | None
    """The proposal that the heat chooses, if there are any."""
    energy: float
    """Share of the heat in the box."""
    box_share: float
    """The box's share of the picture."""


def words_figure(rows: Sequence[Explained]) -> Figure:
    """Draw each picture with a panel a word, its heat over the picture, as the paper's figures do.

    Each panel has a scale of its own, from the word's coldest patch to its hottest.
    """
    per_row = WORD_COLUMNS - 1  # the first column is the picture's
    lines = [-(-len(row.words) // per_row) or 1 for row in rows]
    width = PANEL_INCHES * WORD_COLUMNS
    figure, panels = panel_rows(sum(lines), widths=(1,) * WORD_COLUMNS, width=width)
    first = 0
    for row, num_lines in zip(rows, lines, strict=True):
        image = shrink(row.image)
        picture, *cells = panels[first]
        cells += [cell for line in panels[first + 1 : first + num_lines] for cell in line[1:]]
        picture.imshow(image)
        _title(picture, f"match: {percent(row.match)}", color=BLUE)
        for cell, word, heat in zip(cells, row.words, row.maps, strict=False):
            _show_heat(cell, image, heat)
            _title(cell, word)
        first += num_lines
    if len(rows) == 1:
        text = textwrap.shorten(rows[0].text, 110, placeholder=" ...")
        found = f"Picture and text match with {percent(rows[0].match)}: {drawable(text)}"
    else:
        num_matches = sum(row.match > 0.5 for row in rows)
        found = f"ITM takes {num_matches} of {len(rows)} pictures and their captions for a match"
    figure.suptitle(found, fontsize=10, parse_math=False)
    return figure


def found_figure(name: str, cases: Sequence[Found]) -> Figure:
    """Show expressions with heat, box and chosen proposal; `name` is `best` or `worst`."""
    num_rows = -(-len(cases) // CASE_COLUMNS)
    figure = Figure(figsize=(3.2 * CASE_COLUMNS, 3.1 * num_rows + 0.6), layout="constrained")
    panels = figure.subplots(num_rows, CASE_COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, case in zip(panels, cases, strict=False):
        height, width = case.image.shape[:2]
        _show_heat(panel, shrink(case.image), case.heat, extent=(0, width, height, 0))
        _outline(panel, case.box, color=GREEN, style="-")
        if case.chosen is not None:
            _outline(panel, case.chosen, color=ORANGE, style="--")
        text = textwrap.shorten(case.expression, 38, placeholder=" ...")
        shares = f"{percent(case.energy)} of the heat in {percent(case.box_share)} of the picture"
        _title(panel, f"{text}\n{shares}")
    where = "most" if name == "best" else "least"
    chosen = "; orange: the chosen proposal" if any(c.chosen is not None for c in cases) else ""
    title = f"Where the heat is {where} in the box (green{chosen})"
    figure.suptitle(title, fontsize=10)
    return figure


def grounding_figure(result: "GroundingResult") -> Figure:
    """Draw each metric and slice with its interval, and what a blind guess would reach."""
    found = result.metrics[result.headline]
    return estimates_figure(
        _estimates(result),
        title=(
            f"{result.lens}; {METRIC_NAMES[result.headline]}: {percent(found.value)},"
            f" chance {percent(found.chance)}"
        ),
        what="share with 95 % interval; gray: chance",
    )


def sweep_figure(result: "GroundingResult") -> Figure:
    """Draw the headline metric of every layer and head; the best is framed."""
    layers, heads, scores = _sweep_grid(result)
    figure = Figure(figsize=(0.55 * len(heads) + 1.6, 0.4 * len(layers) + 1.4))
    figure.set_layout_engine("constrained")
    panel = figure.subplots()
    panel.imshow(100 * scores, cmap="cividis", aspect="auto")
    middle = 50 * (scores.min() + scores.max())
    for (y, x), value in np.ndenumerate(100 * scores):
        color = "white" if value < middle else INK
        panel.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    y, x = np.unravel_index(int(scores.argmax()), scores.shape)
    frame = Rectangle((float(x) - 0.5, float(y) - 0.5), 1, 1, fill=False, edgecolor=ORANGE, lw=2.5)
    panel.add_patch(frame)
    panel.set_xticks(range(len(heads)), heads, fontsize=8)
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    panel.set_xlabel("head", fontsize=8)
    panel.set_ylabel("layer", fontsize=8)
    name = METRIC_NAMES[result.headline]
    panel.set_title(f"Best is {result.lens}; {name}: {percent(scores.max())}", fontsize=10)
    return figure


def grounding_table(result: "GroundingResult") -> Table:
    """Lay out an evaluation for the terminal, in percent, with what was left out below."""
    table = Table(
        title=f"Grounding by {result.lens}: {result.num_expressions:,} expressions of"
        f" {result.num_images:,} pictures of {result.corpus}"
    )
    table.add_column("metric")
    table.add_column("value (95 %)")
    table.add_column("chance", justify="right")
    table.add_column("times chance", justify="right")
    headline = METRIC_NAMES[result.headline]
    for name, found in _estimates(result).items():
        cell = interval(found)
        times = f"{found.value / found.chance:.1f}" if found.chance else ""
        style = "bold" if name == headline else None
        table.add_row(name, cell, f"{100 * found.chance:.1f}", times, style=style)
    left_out = {"a picture that does not decode": result.num_undecodable, **result.bad}
    parts = [f"{number:,} with {what}" for what, number in left_out.items() if number]
    if parts:
        table.caption = f"left out: {', '.join(parts)}"
    return table


def sweep_table(result: "GroundingResult") -> Table:
    """Lay out the headline metric of every layer and head, in percent; a star marks the best."""
    layers, heads, scores = _sweep_grid(result)
    table = Table(
        title=f"{METRIC_NAMES[result.headline]} in % by layer and head",
        caption="Chosen on this corpus, the best flatters: report it on another.",
    )
    for name in ("layer", *heads):
        table.add_column(name, justify="right")
    best = int(scores.argmax())
    for y, (layer, row) in enumerate(zip(layers, scores, strict=True)):
        cells = [
            Text(f"*{100 * value:.1f}", style="bold")
            if y * len(heads) + x == best
            else f"{100 * value:.1f}"
            for x, value in enumerate(row)
        ]
        table.add_row(str(layer), *cells)
    return table


def shrink(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    """Make a large picture as small as a figure shows it."""
    picture = Image.fromarray(image)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return np.asarray(picture)


def _estimates(result: "GroundingResult") -> dict[str, Estimate]:
    named = {METRIC_NAMES[name]: found for name, found in result.metrics.items()}
    return named | result.slices


def _sweep_grid(
    result: "GroundingResult",
) -> tuple[list[int], list[str], Float[np.ndarray, "Y X"]]:
    """Give layers, heads by name, and the headline metric of each."""
    layers = sorted({one.lens.layer for one in result.sweep})
    heads = ["mean" if o.lens.head is None else str(o.lens.head) for o in result.sweep]
    heads = list(dict.fromkeys(heads))
    scores = np.array([one.scores[result.headline] for one in result.sweep])
    return layers, heads, scores.reshape(len(layers), len(heads))


def _show_heat(
    panel: Axes,
    image: UInt8[np.ndarray, "H W 3"],
    heat: Float[np.ndarray, "G G"],
    *,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    """Lay heat over a picture, the hotter the thicker; `extent` is left, right, bottom, top."""
    height, width = image.shape[:2]
    extent = extent or (0, width, height, 0)
    warm = heat - heat.min()
    warm = warm / (warm.max() or 1)
    panel.imshow(image, extent=extent)
    panel.imshow(
        warm,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=PALEST + (STRONGEST - PALEST) * warm,
        extent=extent,
        interpolation="bicubic",
    )


def _outline(panel: Axes, box: Box, *, color: str, style: str) -> None:
    left, top, width, height = box
    panel.add_patch(
        Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=3.2)
    )
    panel.add_patch(
        Rectangle(
            (left, top), width, height, fill=False, edgecolor=color, linewidth=2, linestyle=style
        )
    )


def _title(panel: Axes, text: str, *, color: str = INK) -> None:
    panel.set_title(drawable(text), fontsize=8, color=color, pad=3, parse_math=False)
