"""Figures and tables of retrieval beside the headline: the cost of k, slices, worst and best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from rich.table import Table

from albef_core.metrics import RECALLS_AT, Estimate
from pipelines.report import (
    BLUE,
    GRAY,
    GREEN,
    NAMES,
    ORANGE,
    VERMILION,
    interval,
    panel_rows,
    paragraph,
    percent,
    show_picture,
)
from pipelines.retrieval_findings import SweepPoint

if TYPE_CHECKING:
    from pipelines.evaluate import NamedCase, RetrievalResult

LINE_WIDTH, MAX_LINES = 52, 3


def recall_against_k_figure(points: Sequence[SweepPoint], by_itc: Estimate) -> Figure:
    """Draw accuracy against cost: mean recall by the pairs that ITM judges, and by ITC alone."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    panel = figure.subplots()
    values = np.array([100 * p.mean_recall.value for p in points])
    ends = np.array([[100 * p.mean_recall.low, 100 * p.mean_recall.high] for p in points]).T
    # A percentile interval may leave out the value itself.
    reach = np.maximum((ends - values) * [[-1], [1]], 0)
    costs = [point.num_pairs for point in points]
    panel.errorbar(costs, values, reach, fmt="o-", color=ORANGE, capsize=3, label="ITM on top k")
    panel.axhline(100 * by_itc.value, color=BLUE, linewidth=1.2, label="ITC alone")
    for point, cost, value in zip(points, costs, values, strict=True):
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": GRAY}
        panel.annotate(f"k = {point.top_k}", (cost, value), (0, 6), **place)
    panel.set_xscale("log")
    panel.set_xticks(costs, [f"{cost:,}" for cost in costs], fontsize=7)
    panel.minorticks_off()
    panel.set_xlabel("pairs judged by ITM", fontsize=8)
    panel.set_ylabel("mean recall in %, with 95 % interval", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    best = max(points, key=lambda point: point.mean_recall.value)
    figure.suptitle(
        f"Mean recall is best with k = {best.top_k}: {percent(best.mean_recall.value)},"
        f" for {best.num_pairs:,} pairs",
        fontsize=10,
    )
    return figure


def retrieval_cases_figure(
    name: str,
    cases: Sequence["NamedCase"],
    pictures: Sequence[tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "Y X 3"]]],
) -> Figure:
    """Show queries of both directions with what came first; `name` is `best` or `worst`.

    `pictures` are each case's own and that of what came first.
    """
    figure, panels = panel_rows(len(cases), widths=(1, 2.4, 1), width=8.5)
    what = "right" if name == "best" else "wrong"
    figure.suptitle(f"Where the model is surest and {what}", fontsize=10)
    color = GREEN if name == "best" else VERMILION
    shape = {"width": LINE_WIDTH, "max_lines": MAX_LINES}
    for (left, words, right), case, (own, found) in zip(panels, cases, pictures, strict=True):
        show_picture(left, own)
        by_image = case.direction == "image to text"
        left.set_title("query" if by_image else "its picture", fontsize=8, color=GRAY)
        first = f"first, with {percent(case.match)} match"
        if by_image:
            paragraph(words, 0.98, case.found_text, note=first, color=color, **shape)
        else:
            paragraph(words, 0.98, case.text, note="query", color=GRAY, **shape)
        if case.rank == 0:
            if not by_image:
                left.set_title(first, fontsize=8, color=color)
            continue
        show_picture(right, found)
        right.set_title("that one's picture" if by_image else first, fontsize=8, color=color)
        true = f"true is number {case.rank + 1}"
        paragraph(words, 0.44, case.text if by_image else "", note=true, color=BLUE, **shape)
    return figure


def slices_table(result: "RetrievalResult") -> Table:
    """Lay out the recalls of short, medium and long captions for the terminal, in percent."""
    table = Table(title="By the length of the caption, re-ranked by ITM")
    table.add_column("captions")
    for k in RECALLS_AT:
        table.add_column(f"{NAMES[f'ir_r{k}']} (95 %)")
    for name, metrics in result.slices.items():
        cells = [interval(e) for e in metrics.values()]
        table.add_row(name, *cells)
    return table


def recall_against_k_table(result: "RetrievalResult") -> Table:
    """Lay out mean recall against the number of candidates for the terminal, in percent."""
    table = Table(title="ITM on the top k: accuracy against cost")
    table.add_column("k", justify="right")
    table.add_column("pairs judged", justify="right")
    table.add_column("mean recall (95 %)")
    for point in result.sweep:
        e = point.mean_recall
        cell = interval(e)
        table.add_row(str(point.top_k), f"{point.num_pairs:,}", cell)
    return table
