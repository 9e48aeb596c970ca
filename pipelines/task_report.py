"""Figures and tables of a fine-tuned model's evaluation: rows in, a Figure or a Table out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from rich.table import Table

from albef_core.metrics import Estimate
from pipelines.report import (
    BLUE,
    GRAY,
    GREEN,
    VERMILION,
    estimates_figure,
    interval,
    panel_rows,
    paragraph,
    percent,
    show_picture,
)

if TYPE_CHECKING:
    from pipelines.evaluate_task import TaskResult

LINE_WIDTH, MAX_LINES = 60, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One example, what is true of it and what the model said."""

    images: tuple[UInt8[np.ndarray, "H W 3"], ...]
    """The picture, or the left and the right one."""
    text: str
    truth: str
    answer: str
    probability: float
    """The model's own, of its answer."""


def cases_figure(name: str, cases: Sequence[Case]) -> Figure:
    """Show examples with what the model said; `name` is `best` or `worst`: the surest of them."""
    num_pictures = len(cases[0].images)
    widths, width = (*[1.0] * num_pictures, 2.4), 5 + 2 * num_pictures
    figure, panels = panel_rows(len(cases), widths=widths, width=width)
    what = "right" if name == "best" else "wrong"
    figure.suptitle(f"Where the model is surest and {what}", fontsize=10)
    for (*pictures, words), case in zip(panels, cases, strict=True):
        for panel, image in zip(pictures, case.images, strict=True):
            show_picture(panel, image)
        shape = {"width": LINE_WIDTH, "max_lines": MAX_LINES}
        paragraph(words, 0.98, case.text, note="text", color=GRAY, **shape)
        said = f"{case.answer} ({percent(case.probability)})"
        color = GREEN if name == "best" else VERMILION
        paragraph(words, 0.52, said, note="the model says", color=color, **shape)
        if name != "best":
            paragraph(words, 0.24, case.truth, note="true is", color=BLUE, **shape)
    return figure


def slices_figure(accuracy: Estimate, slices: Mapping[str, Estimate]) -> Figure:
    """Draw the accuracy of each slice with its interval, and what saying one thing would reach."""
    return estimates_figure(
        {"all": accuracy, **slices},
        title=f"Right in {percent(accuracy.value)} of all cases",
        what="accuracy with 95 % interval; gray: always the most frequent",
    )


def task_table(result: "TaskResult") -> Table:
    """Lay out an evaluation for the terminal, in percent."""
    table = Table(title=f"{result.task} on {result.num_examples:,} examples of {result.corpus}")
    table.add_column("examples")
    table.add_column("accuracy (95 %)")
    table.add_column(f"always {result.majority!r}", justify="right")
    for name, found in {"all": result.accuracy, **result.slices}.items():
        cell = interval(found)
        style = "bold" if name == "all" else None
        table.add_row(name, cell, f"{100 * found.chance:.1f}", style=style)
    return table
