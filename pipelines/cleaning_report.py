"""What cleaning did to a crawl, for a reader: funnel, failures, histograms, pairs of duplicates."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from albef_core.preprocess import UndecodableImage
from pipelines.crawl_cleaning import Step
from pipelines.crawl_rows import CrawlRows
from pipelines.crawl_store import OK, Crawl
from pipelines.picture_files import UNREADABLE_FILE, read_images
from pipelines.thumbnails import thumbnail

BAR_PX = 300


@dataclass(frozen=True, kw_only=True)
class FunnelRow:
    """A line of the funnel: how many `rows`, `captions` or `pictures` go, how many are left."""

    name: str
    num_removed: int
    what: str
    num_left: int


@dataclass(frozen=True, kw_only=True)
class NearPair:
    """Two pictures of which one was left out; as data URLs."""

    removed_id: str
    removed: str
    kept_id: str
    kept: str


@dataclass(frozen=True, kw_only=True)
class CleaningReport:
    """What cleaning left out, and what it left."""

    funnel: Sequence[FunnelRow]
    failures: Mapping[str, int]
    """Rows that failed or were refused, by class."""
    hosts: Mapping[str, int]
    """Hosts that have most of them."""
    sides: Mapping[str, int]
    """Pictures that are kept, by the shorter side of the original in pixels."""
    words: Mapping[str, int]
    """Captions that are kept, by words."""
    pairs: Sequence[NearPair]


def funnel(rows: CrawlRows, steps: Sequence[Step]) -> list[FunnelRow]:
    """Lay out how listed rows become pictures and captions of a corpus."""
    counts = rows.counts
    left = {"rows": counts.states.total()}
    lines = [FunnelRow(name="listed", num_removed=0, what="rows", num_left=left["rows"])]
    lost = {f"state `{name}`": n for name, n in counts.states.items() if name != OK}
    lost = {name: lost[name] for name in sorted(lost)}
    start = [Step(name, count, "rows") for name, count in lost.items()]
    left |= {"pictures": rows.pictures.num_rows, "captions": rows.captions.num_rows}
    start += [
        Step("stored", 0, "pictures"),
        Step("said of them, by `duplicate` rows too", 0, "captions"),
    ]
    for step in (*start, *steps):
        left[step.what] -= step.num_removed
        lines.append(
            FunnelRow(
                name=step.name,
                num_removed=step.num_removed,
                what=step.what,
                num_left=left[step.what],
            )
        )
    return lines


def histogram(values: NDArray[np.integer]) -> dict[str, int]:
    """Count values in ranges that double every second time: 1, 2, 3, 4 to 5, 6 to 7, 8 to 11..."""
    if not len(values):
        return {}
    edges = sorted({0, 1, *(2**k for k in range(1, 31)), *(3 * 2**k for k in range(30))})
    counts, _edges = np.histogram(values, bins=edges)
    ranges = (
        f"{low}" if high == low + 1 else f"{low} to {high - 1}" for low, high in pairwise(edges)
    )
    some = np.flatnonzero(counts)
    named = dict(zip(ranges, counts.tolist(), strict=True))
    return dict(list(named.items())[some[0] : some[-1] + 1])


def draw_pairs(crawl: Crawl, rows: CrawlRows, pairs: Sequence[tuple[int, int]]) -> list[NearPair]:
    """Read and shrink the pictures of some pairs (left out, kept)."""
    found = []
    for pair in pairs:
        ids = rows.image_ids(np.array(pair)).to_pylist()
        ends = rows.pictures.select(["file", "shard_row"]).take(pa.array(pair)).to_pylist()
        # What cannot be read is copied next, and counted and named there.
        with contextlib.suppress(UndecodableImage, *UNREADABLE_FILE):
            removed, kept = (
                thumbnail(image)
                for end in ends
                for _place, image in read_images(
                    crawl.pictures(rows.files[end["file"]]), np.array([end["shard_row"]])
                )
            )
            found.append(NearPair(removed_id=ids[0], removed=removed, kept_id=ids[1], kept=kept))
    return found


def cleaning_json(report: CleaningReport) -> dict[str, Any]:
    """Give the report without pictures."""
    body = asdict(report)
    body["pairs"] = [[pair.removed_id, pair.kept_id] for pair in report.pairs]
    return body


def cleaning_markdown(report: CleaningReport) -> list[str]:
    """Give the lines of the report without pictures."""
    lines = ["## From listed to kept", "", "| step | left out | of | left |", "|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.num_removed} | {row.what} | {row.num_left} |" for row in report.funnel
    ]
    for title, counts in _tables(report):
        lines += ["", f"## {title}", "", "| | count |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in counts.items()]
    return [*lines, ""]


def cleaning_html(report: CleaningReport) -> str:
    """Give the sections of the report, with the pairs."""
    rows = "".join(
        f"<tr><td>{escape(row.name)}</td><td>{row.num_removed}</td><td>{row.what}</td>"
        f"<td>{row.num_left}</td></tr>"
        for row in report.funnel
    )
    parts = [
        "<h2>From listed to kept</h2><table><tr><th>step</th><th>left out</th><th>of</th>"
        f"<th>left</th></tr>{rows}</table>"
    ]
    parts += [
        f"<h2>{escape(title)}</h2><table>{''.join(_bars(counts))}</table>"
        for title, counts in _tables(report)
    ]
    pairs = "".join(
        f'<figure><img alt="" src="{pair.removed}"> <img alt="" src="{pair.kept}">'
        f"<figcaption><code>{escape(pair.removed_id)}</code> is a copy of"
        f" <code>{escape(pair.kept_id)}</code></figcaption></figure>"
        for pair in report.pairs
    )
    if pairs:
        parts.append(
            f'<h2>Near duplicates: left out, and kept</h2><div class="sheet">{pairs}</div>'
        )
    return "".join(parts)


def _tables(report: CleaningReport) -> Iterator[tuple[str, Mapping[str, int]]]:
    yield "Failed and refused, by class", report.failures
    yield "Failed and refused, by host", report.hosts
    yield "Pictures kept, by shorter side as it came", report.sides
    yield "Captions kept, by words", report.words


def _bars(counts: Mapping[str, int]) -> Iterator[str]:
    most = max(counts.values(), default=0) or 1
    for name, count in counts.items():
        bar = f'<span class="bar" style="width:{BAR_PX * count // most}px"></span>'
        yield f"<tr><td>{escape(name)}</td><td>{count}</td><td>{bar}</td></tr>"
