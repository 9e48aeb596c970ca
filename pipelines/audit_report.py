"""The page and the table of a noise audit: rows in, a Figure or a Table out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from rich.table import Column, Table

from pipelines.audit_words import NearestCaptions
from pipelines.report import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    VERMILION,
    WordTarget,
    bars,
    panel_rows,
    paragraph,
    percent,
    show_picture,
)

if TYPE_CHECKING:
    from pipelines.audit import AuditResult

SIGNALS = {"score": "score (ITC and ITM)", "itc": "ITC alone", "itm": "ITM alone"}


@dataclass(frozen=True, kw_only=True)
class Disbelief:
    """A caption that the model does not believe, and what it would say instead."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    itc: float
    """Cosine with the picture."""
    itm: float
    """Probability of a match."""
    score: float
    """Evidence against the caption, in nats."""
    is_wrong: bool | None
    """Whether it belongs to another picture, where that is known."""
    nearest: NearestCaptions
    """Of the whole corpus."""
    word: WordTarget | None
    """The word that the model would change first."""


def disbelief_figure(rows: Sequence[Disbelief], *, num_pairs: int) -> Figure:
    """Draw the worst captions beside the model's own words and captions for their pictures."""
    figure, axes = panel_rows(len(rows), widths=(1.7, 3.4, 2.6, 5.2), width=13.5)
    for row, (left, middle, words, captions) in zip(rows, axes, strict=True):
        show_picture(left, row.image)
        color = {None: INK, True: VERMILION, False: GREEN}[row.is_wrong]
        what = {None: "caption", True: "caption, known to be wrong", False: "caption, known right"}
        shape = {"width": 44, "max_lines": 3}
        paragraph(middle, 0.98, row.caption, note=what[row.is_wrong], color=color, **shape)
        found = f"{row.score:.1f} nats against it: ITC {row.itc:.2f}, ITM {percent(row.itm)} match"
        paragraph(middle, 0.46, "", note=found, color=GRAY, **shape)
        if row.word is not None:
            note = f"the word was: {row.word.true_word}"
            paragraph(middle, 0.33, row.word.masked_caption, note=note, color=BLUE, **shape)
            truth = row.word.true_word
            bars(words, row.word.words, row.word.probabilities, truth=truth, unit="%")
        near = row.nearest
        bars(captions, near.captions, near.similarities, truth=row.caption, unit="")
    if rows:
        for panel, title in zip(axes[0][2:], ("its words", "its captions, by ITC"), strict=True):
            panel.set_title(title, fontsize=9, color=INK)
    figure.suptitle(_finding(rows, num_pairs))
    return figure


def _finding(rows: Sequence[Disbelief], num_pairs: int) -> str:
    start = f"Of {num_pairs:,} captions the model believes these the least"
    known = [row.is_wrong for row in rows if row.is_wrong is not None]
    return f"{start}: {sum(known)} of {len(known)} are known to be wrong" if known else start


def audit_table(result: "AuditResult") -> Table:
    """Lay out an audit for the terminal."""
    table = Table("corpus", Column(result.corpus, overflow="fold"), title="Audit")
    table.add_row("judged by", f"{result.judged_by} of {result.model}")
    table.add_row("captions judged", f"{result.num_pairs:,}")
    table.add_row("pictures that do not decode", f"{result.num_undecodable:,}")
    table.add_row("empty captions", f"{result.num_empty_captions:,}")
    if result.num_wrong is not None:
        table.add_row("known to be wrong", f"{result.num_wrong:,}")
    for name, found in result.auc.items():
        shown = f"{found.value:.4f}  ({found.low:.4f} - {found.high:.4f})"
        table.add_row(f"AUC by {SIGNALS[name]}, 95 %", shown)
    if result.cleaned:
        table.add_row("captions dropped", f"{result.num_dropped:,}")
        table.add_row("pictures dropped", f"{result.num_pictures_dropped:,}")
        table.add_row("cleaned corpus", f"{result.cleaned}\n{result.cleaned_id}")
    table.add_row("seconds", f"{result.seconds}")
    return table
