"""The report of a crawl: how every row stands, what failed and where, and what it cost."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.crawl_failures import find_failure
from pipelines.crawl_store import FAILED, OK, REFUSED, STATES, Crawl
from pipelines.ingest_report import REPORT_FOLDER, STYLE
from pipelines.ledger import is_any, ledger_groups

WORST_HOSTS = 20
PER_MILLION = 1_000_000
COLUMNS = ("list", "state", "failure", "host", "num_bytes")


@dataclass(frozen=True, kw_only=True)
class CrawlReport:
    """How a crawl stands."""

    folder: Path
    lists: dict[str, int]
    """Rows of each list."""
    states: dict[str, int]
    """Rows in each state; all five are named."""
    failures: dict[str, int]
    """Rows of each class of failure, the most frequent first."""
    hosts: dict[str, int]
    """Failed and refused rows of the hosts that have most of them."""
    num_bytes: int
    """Of all bodies that came."""
    num_fetched: int
    """Rows that ended in this run."""
    seconds: float
    """Of this run."""
    cpu_hours_per_million: float | None
    """CPUs that the actors held, for a million rows at this run's rate; None: it fetched none."""

    @property
    def rows_per_s(self) -> float:
        """Rate of this run."""
        return self.num_fetched / max(self.seconds, 1e-9)


def make_report(crawl: Crawl, *, num_fetched: int, cpus: int, seconds: float) -> CrawlReport:
    """Count the ledger, a piece at a time; `num_fetched`, `cpus` and `seconds` are of this run."""
    states, failures, worst = Counter[str](), Counter[str](), Counter[str]()
    num_bytes = 0
    for partition in range(crawl.num_partitions):
        hosts = Counter[str]()  # a host has one partition
        path = crawl.ledger(partition)
        for group in ledger_groups(path, COLUMNS) if path.exists() else ():
            _count(states, group["state"])
            _count(failures, group["failure"])
            is_bad = is_any(group["state"].combine_chunks(), (FAILED, REFUSED))
            _count(hosts, group["host"].filter(pa.array(is_bad)))
            num_bytes += int(group["num_bytes"].fill_null(0).to_numpy().sum())
        worst = Counter(dict((worst + hosts).most_common(WORST_HOSTS)))
    cost = seconds * cpus / 3600 / num_fetched * PER_MILLION if num_fetched else None
    return CrawlReport(
        folder=crawl.folder,
        lists={one.name: one.num_rows for one in crawl.lists},
        states={state: states[state] for state in STATES},
        failures=dict(failures.most_common()),
        hosts=dict(worst.most_common()),
        num_bytes=num_bytes,
        num_fetched=num_fetched,
        seconds=round(seconds, 1),
        cpu_hours_per_million=cost and round(cost, 3),
    )


def _count(counts: Counter[str], names: pa.ChunkedArray) -> None:
    for one in names.value_counts().to_pylist():
        if one["values"] is not None:
            counts[one["values"]] += one["counts"]


def report_body(report: CrawlReport) -> dict[str, Any]:
    """Give a report as JSON has it."""
    return {**asdict(report), "folder": str(report.folder), "rows_per_s": report.rows_per_s}


def write_crawl_report(report: CrawlReport) -> None:
    """Write report.json, report.md and report.html."""
    folder = report.folder / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report_body(report), indent=1) + "\n")
    (folder / "report.md").write_text(_as_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(_as_html(report), encoding="utf-8")


def _tables(report: CrawlReport) -> dict[str, list[tuple[str, ...]]]:
    total = sum(report.states.values())
    cost = report.cpu_hours_per_million
    facts = [(f"rows of {name}", f"{number:,}") for name, number in report.lists.items()]
    facts += [
        (state, f"{number:,} ({number / max(total, 1):.1%})")
        for state, number in report.states.items()
    ]
    facts += [
        ("bytes that came", f"{report.num_bytes:,}"),
        ("rows that ended in this run", f"{report.num_fetched:,}"),
        ("seconds of this run", f"{report.seconds:,}"),
        ("rows a second", f"{report.rows_per_s:,.1f}"),
        ("CPU hours for a million rows", "-" if cost is None else f"{cost:,}"),
    ]
    failures = [
        (name, f"{number:,}", _again(name), find_failure(name).meaning)
        for name, number in report.failures.items()
    ]
    return {
        "The crawl": [("what", "value"), *facts],
        "Rows without a picture, by class": [("class", "rows", "may pass", "meaning"), *failures],
        f"Hosts with most of them (up to {WORST_HOSTS})": [
            ("host", "rows"),
            *((name or "(no host)", f"{number:,}") for name, number in report.hosts.items()),
        ],
    }


def _again(failure: str) -> str:
    return "yes" if find_failure(failure).is_transient else "no"


def _as_markdown(report: CrawlReport) -> str:
    lines = ["# Crawl report", ""]
    for title, (head, *rows) in _tables(report).items():
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _as_html(report: CrawlReport) -> str:
    body = ""
    for title, (head, *rows) in _tables(report).items():
        cells = "".join(f"<th>{escape(name)}</th>" for name in head)
        body += f"<h2>{escape(title)}</h2><table><tr>{cells}</tr>"
        for row in rows:
            body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        body += "</table>"
    total = max(sum(report.states.values()), 1)
    share = 100 * report.states[OK] / total
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Crawl report</title>'
        f"<style>{STYLE}</style><h1>Crawl report</h1>"
        f'<p><span class="bar" style="width:{share:.0f}%"></span> {share:.1f} % stored</p>'
        f"{body}</html>\n"
    )
