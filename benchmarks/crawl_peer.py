"""img2dataset beside the crawler, on the same list: what each took, stored, lost and should not."""

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from benchmarks.crawl_rig import Rig, crawl_command, read_ledger, serving
from benchmarks.measured import Cost, measure
from pipelines.crawl_store import DUPLICATE, OK

PEER_FLAGS = (
    "--processes_count=2",
    "--thread_count=32",
    "--retries=2",
    "--timeout=10",
    "--resize_mode=keep_ratio",
    "--image_size=256",
    "--resize_only_if_bigger=True",
    "--encode_quality=95",
    "--compute_hash=sha256",
    "--output_format=webdataset",
    "--number_sample_per_shard=1000",
    "--enable_wandb=False",
)
"""Its quickest settings here: with 10,000 rows a shard, its default, 8,000 rows are one process."""
PEER_ENV = {"NO_ALBUMENTATIONS_UPDATE": "1"}
LEFT_OUT = ("drip", "no-url", "no-tab", "no-utf8")
"""Faults that neither gets: one URL that drips holds a shard of the peer's for hours, and its list
is Parquet, which has no damaged lines."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One crawl of one list by one of the two."""

    who: str
    cost: Cost
    num_rows: int
    stored: int
    """Good pictures that it has."""
    lost: int
    """Good pictures that it has not."""
    wrong: int
    """What it stored of rows that give no picture, or that nobody may take."""
    wrong_faults: dict[str, int]
    lost_faults: dict[str, int]

    @property
    def pictures_per_s(self) -> float:
        """Good pictures a second."""
        return self.stored / self.cost.wall_s

    @property
    def rows_per_s(self) -> float:
        """Rows a second."""
        return self.num_rows / self.cost.wall_s

    @property
    def ms_per_picture(self) -> float:
        """CPU milliseconds for a good picture."""
        return 1000 * self.cost.cpu_s / max(self.stored, 1)


def side_by_side(
    rig: Rig, *, peer_python: Path, rounds: int, flags: tuple[str, ...], limit_s: float
) -> list[Outcome]:
    """Crawl the list by both in turn, each time into a new folder and from a fresh server."""
    peer_list = rig.folder / "list.parquet"
    rows = rig.rows()
    listed = {"url": [row["url"] for row in rows], "caption": [str(row["row"]) for row in rows]}
    pq.write_table(pa.table(listed), peer_list)
    peer = [str(peer_python.with_name("img2dataset")), "--url_list", str(peer_list)]
    peer += ["--input_format=parquet", "--url_col=url", "--caption_col=caption", *PEER_FLAGS]

    def ours(out: Path) -> tuple[list[str], Callable[[Path], set[str]]]:
        return crawl_command(rig.listed, out, *flags), stored_by_us

    def theirs(out: Path) -> tuple[list[str], Callable[[Path], set[str]]]:
        return [*peer, "--output_folder", str(out)], stored_by_peer

    found = []
    for number in range(rounds):
        for who, start in (("crawl", ours), ("img2dataset", theirs)):
            out = rig.folder / f"{who}-{number}"
            command, read_stored = start(out)
            with serving(rig):
                cost = measure(command, rig.folder / f"{who}.log", env=PEER_ENV, limit_s=limit_s)
            found.append(_judge(who, cost, rows, read_stored(out)))
            shutil.rmtree(out)
    return found


def stored_by_us(out: Path) -> set[str]:
    """Give the URLs whose pictures the crawler stored."""
    ledger = read_ledger(out, "url", "state").to_pylist()
    return {row["url"] for row in ledger if row["state"] == OK}


def stored_by_peer(out: Path) -> set[str]:
    """Give the URLs whose pictures img2dataset stored."""
    found = set()
    for file in out.glob("*.parquet"):
        table = pq.read_table(file, columns=["url", "status"]).to_pylist()
        found |= {row["url"] for row in table if row["status"] == "success"}
    return found


def _judge(who: str, cost: Cost, rows: list[dict[str, Any]], stored: set[str]) -> Outcome:
    lost, wrong, num_stored = dict[str, int](), dict[str, int](), 0
    for row in rows:
        fault, is_stored = row["fault"], row["url"] in stored
        if row["state"] == OK:
            num_stored += is_stored
            if not is_stored:
                lost[fault] = lost.get(fault, 0) + 1
        elif row["state"] != DUPLICATE and is_stored:
            wrong[fault] = wrong.get(fault, 0) + 1
    return Outcome(
        who=who,
        cost=cost,
        num_rows=len(rows),
        stored=num_stored,
        lost=sum(lost.values()),
        wrong=sum(wrong.values()),
        lost_faults=lost,
        wrong_faults=wrong,
    )


def table_of(title: str, outcomes: list[Outcome]) -> Table:
    """Show every crawl, and below the ratios of medians."""
    columns = "who", "exit", "s", "rows/s", "pictures/s", "CPU ms a picture", "peak GB"
    table = Table(*columns, "stored", "lost", "stored wrongly", title=title)
    for one in outcomes:
        cells = [one.who, one.cost.code, f"{one.cost.wall_s:.0f}", f"{one.rows_per_s:.0f}"]
        cells += [f"{one.pictures_per_s:.0f}", f"{one.ms_per_picture:.2f}", one.cost.peak_gb]
        table.add_row(*map(str, [*cells, one.stored, one.lost, one.wrong]))
    ratios = ratios_of(outcomes)
    table.caption = ", ".join(f"{name}: {ratio:.2f} times" for name, ratio in ratios.items())
    return table


def ratios_of(outcomes: list[Outcome]) -> dict[str, float]:
    """Compare medians over the rounds: above 1, the crawler is better."""

    def median(who: str, get: Callable[[Outcome], float]) -> float:
        return statistics.median(get(one) for one in outcomes if one.who == who)

    measures: dict[str, Callable[[Outcome], float]] = {
        "rows/s": lambda one: one.rows_per_s,
        "pictures/s": lambda one: one.pictures_per_s,
        "pictures per CPU second": lambda one: 1000 / one.ms_per_picture,
    }
    return {
        name: round(median("crawl", get) / max(median("img2dataset", get), 1e-9), 3)
        for name, get in measures.items()
    }


def write_outcomes(path: Path, found: dict[str, list[Outcome]]) -> None:
    """Write every number as JSON."""
    body = {
        name: {"crawls": [asdict(one) for one in outcomes], "times": ratios_of(outcomes)}
        for name, outcomes in found.items()
    }
    path.write_text(json.dumps(body, indent=1))
