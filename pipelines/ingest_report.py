"""The report of an ingest: counts, what was bad by name, and a sheet of pictures with captions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rich.table import Column, Table

from pipelines.annotations import show_annotations
from pipelines.cleaning_report import (
    CleaningReport,
    cleaning_html,
    cleaning_json,
    cleaning_markdown,
)
from pipelines.manifest import Manifest, read_row_group
from pipelines.records import Bad
from pipelines.thumbnails import thumbnail

REPORT_FOLDER = "report"
SHEET_PICTURES = 24
CAPTION_CHARS = 200
# So many bad ones of each class are named in the pages; the JSON names all.
NAMED = 20

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 2px 16px 2px 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px; }
figure { margin: 0; font-size: 13px; } figure p { margin: 2px 0; } code { font-size: 12px; }
.bar { display: inline-block; height: 0.8em; background: #4477aa; }
"""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingest has made, and everything that it could not use."""

    folder: Path
    content_id: str = ""
    num_images: int = 0
    num_captions: int = 0
    num_uncaptioned: int = 0
    annotations: dict[str, int] = field(default_factory=dict)
    """Questions, statements, boxes and so on, by name."""
    num_answers: int = 0
    """Distinct answers: the size of a list of all."""
    num_shards: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    bad_counts: dict[str, int] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    seconds: float = 0.0
    cleaning: CleaningReport | None = None
    """What became of a crawl's rows."""


def write_report(report: IngestReport, manifest: Manifest | None) -> None:
    """Write report.json, report.md and report.html; without a manifest, no corpus came to be."""
    folder = report.folder / REPORT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(_as_json(report), encoding="utf-8")
    (folder / "report.md").write_text(_as_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(_as_html(report, manifest), encoding="utf-8")


def ingest_table(report: IngestReport) -> Table:
    """Lay out an ingest for the terminal."""
    table = Table("corpus", Column(str(report.folder), overflow="fold"), title="Ingest")
    if report.cleaning:
        table.add_row("listed", f"{report.cleaning.funnel[0].num_left:,} rows")
        for row in report.cleaning.funnel:
            if row.num_removed:
                lost = f"{row.num_removed:,} of {row.num_removed + row.num_left:,} {row.what}"
                table.add_row(f"left out: {row.name}", lost)
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("captions", f"{report.num_captions:,}")
    for what, count in report.annotations.items():
        table.add_row(what, f"{count:,}")
    for kind, count in report.bad_counts.items():
        table.add_row(f"bad: {kind}", f"{count:,}")
    table.add_row("content id", report.content_id)
    table.add_row("report", str(report.folder / REPORT_FOLDER / "report.html"))
    table.add_row("seconds", f"{report.seconds}")
    if not report.num_uncaptioned:
        table.add_row("next", f"python jobs/pretrain.py tiny --corpus {report.folder}")
    return table


def _as_json(report: IngestReport) -> str:
    names: dict[str, list[dict[str, str]]] = {kind: [] for kind in report.bad_counts}
    for one in report.bad:
        names[one.kind].append({"name": one.name, "detail": one.detail})
    body = {**dict(_facts(report)), "sources": report.sources, "bad": report.bad_counts}
    if report.cleaning:
        body["cleaning"] = cleaning_json(report.cleaning)
    return json.dumps({**body, "bad_names": names}, indent=1)


def _facts(report: IngestReport) -> Iterator[tuple[str, str | int | float]]:
    yield "images", report.num_images
    yield "captions", report.num_captions
    if report.num_uncaptioned:
        yield "images without a caption", report.num_uncaptioned
    yield from report.annotations.items()
    if report.num_answers:
        yield "distinct answers", report.num_answers
    yield "shards", report.num_shards
    yield "content_id", report.content_id or "none: the ingest was stopped"
    yield "seconds", report.seconds


def _as_markdown(report: IngestReport) -> str:
    lines = ["# Ingest report", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(report)]
    lines += [f"| images of {name} | {count} |" for name, count in report.sources.items()]
    lines += ["", *(cleaning_markdown(report.cleaning) if report.cleaning else [])]
    lines += ["## Left out or mended", ""]
    if not report.bad:
        lines.append("Nothing.")
    for kind, count in report.bad_counts.items():
        lines += [f"### {kind}: {count}", ""]
        lines += [f"- `{one.name}` {one.detail}".rstrip() for one in _some(report, kind)]
        lines += [f"- ... and {count - NAMED} more in report.json"] if count > NAMED else []
        lines.append("")
    return "\n".join(lines) + "\n"


def _some(report: IngestReport, kind: str) -> list[Bad]:
    return [one for one in report.bad if one.kind == kind][:NAMED]


def _as_html(report: IngestReport, manifest: Manifest | None) -> str:
    rows = [(name, str(value)) for name, value in _facts(report)]
    rows += [(f"images of {name}", str(count)) for name, count in report.sources.items()]
    facts = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    bad = "".join(
        f"<h3>{escape(kind)}: {count}</h3><ul>"
        + "".join(
            f"<li><code>{escape(one.name)}</code> {escape(one.detail)}</li>"
            for one in _some(report, kind)
        )
        + (f"<li>... and {count - NAMED} more in report.json</li>" if count > NAMED else "")
        + "</ul>"
        for kind, count in report.bad_counts.items()
    )
    sheet = "".join(_figures(manifest)) if manifest else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Ingest report</title>'
        f"<style>{STYLE}</style><h1>Ingest report</h1><table>{facts}</table>"
        f"{cleaning_html(report.cleaning) if report.cleaning else ''}"
        f"<h2>Left out or mended</h2>{bad or '<p>Nothing.</p>'}"
        f'<h2>Pictures and what is said of them</h2><div class="sheet">{sheet}</div></html>\n'
    )


def _figures(manifest: Manifest) -> Iterator[str]:
    """Show the first rows: they are a random sample, as rows are written in random order."""
    left = SHEET_PICTURES
    for group in manifest.row_groups():
        columns = ["image", "image_id", "captions", "annotations"]
        table = read_row_group(manifest.folder, group.shard, group.index, columns)
        for row in table.slice(0, left).to_pylist():
            told = [*row["captions"], *show_annotations(json.loads(row["annotations"] or "{}"))]
            texts = "".join(f"<p>{escape(_shorten(text))}</p>" for text in told)
            yield (
                f'<figure><img alt="" src="{thumbnail(row["image"])}">'
                f"<figcaption><code>{escape(row['image_id'])}</code>{texts}</figcaption></figure>"
            )
        left -= min(left, table.num_rows)
        if not left:
            return


def _shorten(text: str) -> str:
    return text if len(text) <= CAPTION_CHARS else f"{text[:CAPTION_CHARS]} ..."
