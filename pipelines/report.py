"""Figures and tables: rows in, a Figure or a Table out, no files.

Every title states what was found; colors are those of Okabe and Ito, safe for the color-blind.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from albef_core.metrics import Estimate

if TYPE_CHECKING:
    from pipelines.evaluate import RetrievalResult

BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
INK, GRAY, PALE = "#222222", "#767676", "#C8D8E4"
ROW_HEIGHT = 1.7
MISSING_GLYPH = "\N{WHITE SQUARE}"
STAGES = {"itc": "ITC alone", "itm": "ITM on the top k"}
METRICS = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "mean_recall")
NAMES = {
    **{f"tr_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"ir_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    "mean_recall": "mean recall",
}


@dataclass(frozen=True, kw_only=True)
class HardNegative:
    """One pair of a batch, with the text and the picture that ITM was shown in its place."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    match: float
    """ITM's probability that image and caption belong together; they do."""
    negative_caption: str
    negative_caption_match: float
    """ITM's probability that image and negative caption belong together; they do not."""
    negative_image: UInt8[np.ndarray, "H W 3"]
    negative_image_match: float
    """ITM's probability that negative image and caption belong together; they do not."""


@dataclass(frozen=True, kw_only=True)
class WordTarget:
    """What the teacher would put in the place of one masked word."""

    image: UInt8[np.ndarray, "H W 3"]
    masked_caption: str
    """The caption with [MASK] where the word was."""
    true_word: str
    words: Sequence[str]
    """The teacher's best words, best first."""
    probabilities: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class CaptionTarget:
    """Which captions the teacher finds most similar to one picture."""

    image: UInt8[np.ndarray, "H W 3"]
    true_caption: str
    captions: Sequence[str]
    """The teacher's best captions, best first."""
    similarities: Sequence[float]
    """Their cosines with the picture."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over training."""

    steps: Sequence[int]
    values: Sequence[float]


def hard_negatives_figure(rows: Sequence[HardNegative]) -> Figure:
    """Draw pairs with their hard negatives: the text for a picture, the picture for a text."""
    judged = [p for row in rows for p in (row.negative_caption_match, row.negative_image_match)]
    num_fooled = sum(probability > 0.5 for probability in judged)
    figure, axes = panel_rows(len(rows), widths=(1.7, 5.6, 1.7), width=9)
    for row, (left, middle, right) in zip(rows, axes, strict=True):
        show_picture(left, row.image)
        show_picture(right, row.negative_image)
        own = f"pair: {percent(row.match)} match"
        paragraph(middle, 0.98, row.caption, note=own, color=GREEN, width=66, max_lines=4)
        other = f"text negative: {percent(row.negative_caption_match)} match"
        paragraph(
            middle, 0.46, row.negative_caption, note=other, color=VERMILION, width=66, max_lines=4
        )
        note = f"{percent(row.negative_image_match)} match"
        right.set_title(note, fontsize=8, color=VERMILION, pad=3)
    if rows:
        axes[0][0].set_title("picture", fontsize=9, color=INK)
        axes[0][2].set_title(
            f"picture negative\n{axes[0][2].get_title()}", fontsize=8, color=VERMILION, pad=3
        )
    figure.suptitle(f"ITM takes {num_fooled} of {len(judged)} hard negatives for a match")
    return figure


def pseudo_targets_figure(words: Sequence[WordTarget], captions: Sequence[CaptionTarget]) -> Figure:
    """Draw the teacher's pseudo-targets (Fig. 2 of the paper): words for a mask, then captions."""
    figure, axes = panel_rows(len(words) + len(captions), widths=(1.7, 3.2, 5.6), width=10.5)
    for word, (left, middle, right) in zip(words, axes[: len(words)], strict=True):
        show_picture(left, word.image)
        note = f"the word was: {word.true_word}"
        paragraph(middle, 0.98, word.masked_caption, note=note, color=INK, width=38, max_lines=7)
        bars(right, word.words, word.probabilities, truth=word.true_word, unit="%")
    for target, (left, middle, right) in zip(captions, axes[len(words) :], strict=True):
        show_picture(left, target.image)
        note = "its own caption"
        paragraph(middle, 0.98, target.true_caption, note=note, color=INK, width=38, max_lines=7)
        bars(right, target.captions, target.similarities, truth=target.true_caption, unit="")
    findings = [
        _found("word", sum(w.true_word in w.words for w in words), len(words)),
        _found("caption", sum(c.true_caption in c.captions for c in captions), len(captions)),
    ]
    figure.suptitle("The teacher's best five hold " + ", ".join(filter(None, findings)))
    return figure


def training_curves_figure(curves: Mapping[str, Curve]) -> Figure:
    """Draw each metric in a panel of its own: every point pale, the running mean dark."""
    num_columns = min(3, len(curves))
    num_rows = -(-len(curves) // num_columns)
    figure = Figure(figsize=(3.6 * num_columns, 2.3 * num_rows + 0.5), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        smooth = _running_mean(np.asarray(curve.values, dtype=float))
        panel.plot(curve.steps, curve.values, color=PALE, linewidth=1)
        panel.plot(curve.steps, smooth, color=BLUE, linewidth=1.6)
        panel.set_title(f"{name}: {smooth[-1]:.3g}", fontsize=9, color=INK, loc="left")
        panel.set_xlabel("step", fontsize=8, color=GRAY)
        _plain(panel)
    name, curve = next(iter(curves.items()))
    smooth = _running_mean(np.asarray(curve.values, dtype=float))
    figure.suptitle(
        f"{name} went from {smooth[0]:.3g} to {smooth[-1]:.3g} in {curve.steps[-1]:,} steps"
    )
    return figure


def recall_figure(stages: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """Draw recall with 95 % intervals, and what chance would reach, for `itc` and `itm`."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panel = figure.subplots()
    width = 0.8 / len(stages)
    for number, (stage, metrics) in enumerate(stages.items()):
        estimates = [metrics[name] for name in METRICS]
        values = np.array([100 * e.value for e in estimates])
        ends = np.array([[100 * e.low, 100 * e.high] for e in estimates]).T
        places = np.arange(len(METRICS)) + (number - (len(stages) - 1) / 2) * width
        color = (BLUE, ORANGE)[number]
        panel.bar(places, values, width * 0.92, color=color, label=STAGES[stage])
        reach = np.abs(ends - values)
        panel.errorbar(places, values, reach, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for place, value, top in zip(places, values, np.maximum(ends[1], values), strict=True):
            panel.annotate(
                f"{value:.1f}",
                (place, top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=INK,
            )
    last = list(stages.values())[-1]
    for place, name in enumerate(METRICS):
        chance = 100 * last[name].chance
        panel.hlines(
            chance,
            place - 0.44,
            place + 0.44,
            color=VERMILION,
            linewidth=1.8,
            label="chance" if place == 0 else "",
        )
    panel.set_xticks(range(len(METRICS)), [NAMES[n].replace(" R@", "\nR@") for n in METRICS])
    panel.set_ylabel("recall in %")
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    _plain(panel)
    mean = last["mean_recall"]
    figure.suptitle(
        f"Mean recall is {percent(mean.value)} ({percent(mean.low)} to {percent(mean.high)}),"
        f" {mean.value / mean.chance:.1f} times chance"
    )
    return figure


def summary_table(result: "RetrievalResult") -> Table:
    """Lay out an evaluation for the terminal: each metric with interval and chance, in percent."""
    table = Table(
        title=f"Retrieval, {result.protocol}, on {result.corpus_name}:"
        f" {result.num_images:,} pictures, {result.num_texts:,} captions"
    )
    table.add_column("metric")
    for stage in result.metrics:
        table.add_column(f"{STAGES[stage].replace('top k', f'top {result.top_k}')} (95 %)")
    table.add_column("chance", justify="right")
    for name in METRICS:
        estimates = [metrics[name] for metrics in result.metrics.values()]
        cells = [interval(e) for e in estimates]
        style = "bold" if name == "mean_recall" else None
        table.add_row(NAMES[name], *cells, f"{100 * estimates[0].chance:.1f}", style=style)
    return table


def panel_rows(
    num_rows: int, *, widths: Sequence[float], width: float
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with so many rows of panels without axes, `widths` wide to each other."""
    figure = Figure(figsize=(width, max(1, num_rows) * ROW_HEIGHT + 0.6), layout="constrained")
    if not num_rows:
        return figure, []
    grid = figure.subplots(num_rows, len(widths), squeeze=False, width_ratios=widths)
    for panel in grid.ravel():
        panel.set_axis_off()
    return figure, grid.tolist()


def show_picture(panel: Axes, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Show a picture without axes."""
    panel.imshow(image)


def paragraph(
    panel: Axes, top: float, text: str, *, note: str, color: str, width: int, max_lines: int
) -> None:
    """Write a heading, `top` up the panel, and text below it, in lines of `width` letters."""
    lines = textwrap.wrap(text, width, max_lines=max_lines, placeholder=" ...")
    style = {"va": "top", "transform": panel.transAxes, "parse_math": False}
    panel.text(0, top, drawable(note), fontsize=8, color=color, fontweight="bold", **style)
    panel.text(0, top - 0.13, drawable("\n".join(lines)), fontsize=9, color=INK, **style)


def bars(
    panel: Axes, labels: Sequence[str], values: Sequence[float], *, truth: str, unit: str
) -> None:
    """Draw a bar a candidate, best on top, its label on it; the true one in another color.

    Values lie between 0 and 1; unit "%" writes them as percentages, "" as they are.
    """
    panel.set_axis_on()
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    places = np.arange(len(labels))
    widths = np.maximum(values, 0)
    colors = [ORANGE if label == truth else PALE for label in labels]
    panel.barh(places, widths, 0.86, color=colors)
    panel.set_ylim(max(5, len(labels)) - 0.5, -0.5)
    panel.set_xlim(0, 1)
    for place, (label, value) in enumerate(zip(labels, values, strict=True)):
        shown = f"{100 * value:.1f} %" if unit else f"{value:.2f}"
        text = textwrap.shorten(label, 72, placeholder=" ...") if label.strip() else label
        panel.text(
            0.01,
            place,
            f"{shown}   {drawable(text)}",
            va="center",
            fontsize=8,
            color=INK,
            parse_math=False,
        )


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8, colors=GRAY)
    panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Average over a twentieth of the curve on each side, less at its ends."""
    reach = max(1, len(values) // 20)
    sums = np.concatenate([[0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _found(what: str, num_found: int, num_all: int) -> str:
    return f"the true {what} {num_found} of {num_all} times" if num_all else ""


def percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{100 * share:.1f} %"


def interval(found: Estimate) -> str:
    """Say a share and its interval for a terminal's table, in percent."""
    return f"{100 * found.value:5.1f}  ({100 * found.low:.1f} - {100 * found.high:.1f})"


def drawable(text: str) -> str:
    """Replace what the font cannot draw by a square; matplotlib would warn at each."""
    return "".join(c if c == "\n" or ord(c) in _glyphs() else MISSING_GLYPH for c in text)


@cache
def _glyphs() -> frozenset[int]:
    font = font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"]))
    return frozenset(font_manager.get_font(font).get_charmap())


def estimates_figure(rows: Mapping[str, Estimate], *, title: str, what: str) -> Figure:
    """Draw shares of 1 below each other, each with its interval and, in gray, its chance.

    `what` names the axis.
    """
    figure = Figure(figsize=(6.5, 0.4 * len(rows) + 1.2), layout="constrained")
    panel = figure.subplots()
    places = np.arange(len(rows))
    values = np.array([estimate.value for estimate in rows.values()])
    spread = np.array([[e.value - e.low, e.high - e.value] for e in rows.values()]).T
    # A percentile interval of a small slice may leave out the value itself.
    panel.errorbar(values, places, xerr=np.maximum(spread, 0), fmt="o", color=BLUE, capsize=3)
    panel.plot([e.chance for e in rows.values()], places, "|", color=GRAY, markersize=14)
    panel.set_yticks(places, list(rows), fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1)
    panel.set_xlabel(what, fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    return figure
