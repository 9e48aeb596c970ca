"""Trials of the crawler: killed at random moments, beside millions of done rows, on real lists."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
from rich.console import Console

from benchmarks.crawl_rig import (
    JOBS,
    Rig,
    crawl_command,
    ended_rows,
    read_ledger,
    serving,
    stored_urls,
)
from benchmarks.measured import measure
from benchmarks.training_process import descendants, kill_all, wait_until_gone
from pipelines.crawl_failures import TRANSIENT, find_failure
from pipelines.crawl_store import (
    LEDGER_SCHEMA,
    OK,
    VERSION,
    Crawl,
    Listed,
    write_crawl,
)
from pipelines.fault_list import find_differences
from pipelines.ledger import ROWS_PER_LEDGER_GROUP, ledger_writer
from pipelines.manifest import read_manifest, tool_version

STEP_TIMEOUT_S = 900.0
SHOWN = 20
"""Differences that are printed."""
ROWS_PER_PARTITION = 20_000
SAME_MEMORY = 1.1
CONTACT = "https://example.org/benchmark"


def disturbed_crawl(
    rig: Rig, *, kills: int, rng: random.Random, flags: tuple[str, ...], console: Console
) -> bool:
    """Crawl undisturbed, and again with kill -9; compare both with the truth and each other.

    Right if every row of both ledgers is as the truth says, nothing was fetched again that was
    committed before a kill, and the corpora of both have the same content.
    """
    log, calm, shaken = (rig.folder / name for name in ("crawl.log", "calm", "shaken"))
    with serving(rig):
        cost = measure(crawl_command(rig.listed, calm, *flags), log)
    console.print(f"undisturbed: exit code {cost.code}, {cost.wall_s:.0f} s")
    told = [f"undisturbed: {one}" for one in find_differences(calm, rig.truth)]
    num_rows = len(ended_rows(calm))
    plain = {row["url"] for row in rig.rows() if row["fault"] == "picture"}
    snapshots: list[dict[str, int]] = []
    with serving(rig):
        for number in range(kills):
            share = (number + rng.uniform(0.1, 0.9)) / (kills + 1)
            ended = _kill_after(
                crawl_command(rig.listed, shaken, *flags),
                shaken,
                log,
                share * num_rows,
                rng=rng,
                with_all=number % 2 == 1,
            )
            served = rig.served()
            paths = (url.partition("://")[2] for url in stored_urls(shaken) if url in plain)
            snapshots.append({path: served.get(path, 0) for path in paths})
            who = "all processes" if number % 2 else "the command"
            console.print(f"killed {who} when {ended:,} of {num_rows:,} rows had ended")
        cost = measure(crawl_command(rig.listed, shaken, *flags), log)
        served = rig.served()
    console.print(f"gone on: exit code {cost.code}, {cost.wall_s:.0f} s")
    told += [f"killed: {one}" for one in find_differences(shaken, rig.truth, was_disturbed=True)]
    told += [
        f"fetched again: {path}"
        for path, times in {p: n for one in reversed(snapshots) for p, n in one.items()}.items()
        if served[path] != times
    ]
    contents = [_content_id(out, log) for out in (calm, shaken)]
    if contents[0] != contents[1]:
        told.append(f"the corpora differ: {contents[0]} and {contents[1]}")
    for one in told[:SHOWN]:
        console.print(one)
    console.print(f"{len(told):,} differences from the truth; content id {contents[1]}")
    return not told


def _kill_after(
    command: list[str],
    out: Path,
    log: Path,
    num_ended: float,
    *,
    rng: random.Random,
    with_all: bool,
) -> int:
    """Start a crawl, and kill it when about so many rows have ended; give how many really had."""
    with log.open("a") as file:
        driver = psutil.Popen(command, stdout=file, stderr=file)
    deadline, family = time.monotonic() + STEP_TIMEOUT_S, []
    try:
        while len(ended_rows(out)) < num_ended:
            if driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{num_ended:.0f} rows never ended, see {log}")
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 2))  # in the midst of whatever it does then
        family = descendants(driver)
        kill_all([driver, *family] if with_all else [driver])
    finally:
        kill_all([driver])
        driver.wait()
        wait_until_gone(family)
    return len(ended_rows(out))


def _content_id(out: Path, log: Path) -> str:
    corpus = out.with_name(f"{out.name}-corpus")
    command = [sys.executable, str(JOBS / "ingest.py"), "--source", str(out), "--out", str(corpus)]
    with log.open("a") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True)
    return read_manifest(corpus).content_id


def memory_of_done_rows(
    rig: Rig, *, num_done: int, flags: tuple[str, ...], console: Console
) -> bool:
    """Crawl the list into an empty folder, and into one that has done millions of rows before."""
    peaks = []
    for name, before in (("few", 0), ("many", num_done)):
        out = rig.folder / name
        if before:
            write_done_rows(out, before)
        with serving(rig):
            cost = measure(crawl_command(rig.listed, out, *flags), rig.folder / "crawl.log")
        num_rows = before + len(rig.rows())
        console.print(
            f"{num_rows:,} rows, {before:,} of them done: peak {cost.peak_gb:.2f} GB, exit code"
            f" {cost.code}, {cost.wall_s:.0f} s, {cost.cpu_s:.0f} CPU s"
        )
        peaks.append(cost.peak_gb if cost.code == 0 else float("inf"))
    console.print(f"{peaks[1] / peaks[0]:.2f} times")
    return peaks[1] <= SAME_MEMORY * peaks[0]


def write_done_rows(folder: Path, num_rows: int) -> None:
    """Write a crawl whose rows are all done, as if another list had been crawled before.

    There are no pictures: their files are named, and nothing reads them.
    """
    num_partitions = -(-num_rows // ROWS_PER_PARTITION)
    done = Listed(name="done", files=("done.tsv",), num_bytes=num_rows * 100, num_rows=num_rows)
    crawl = Crawl(
        version=VERSION,
        num_partitions=num_partitions,
        lists=(done,),
        settings={"resize": "keep_ratio", "image_size": 256, "jpeg_quality": 95},
        tool_version=tool_version(),
        folder=folder,
    )
    for partition in range(num_partitions):
        first = partition * ROWS_PER_PARTITION
        rows = range(first, min(first + ROWS_PER_PARTITION, num_rows))
        with ledger_writer(crawl.ledger(partition)) as writer:
            writer.write_table(_done_rows(rows, partition), ROWS_PER_LEDGER_GROUP)
    write_crawl(crawl)


def _done_rows(rows: range, partition: int) -> pa.Table:
    size = len(rows)
    same = {
        "list": "done",
        "state": OK,
        "failure": None,
        "detail": None,
        "attempts": 1,
        "first_at": 1_700_000_000_000,
        "last_at": 1_700_000_000_500,
        "http_status": 200,
        "num_bytes": 80_000,
        "original_width": 500,
        "original_height": 375,
        "width": 341,
        "height": 256,
        "shard": f"part-{partition:04d}-000001.parquet",
    }
    told = {name: [value] * size for name, value in same.items()} | {
        "row": list(rows),
        "url": [f"http://host-{row % 977}.example/photographs/{row}.jpg" for row in rows],
        "caption": [f"Photograph number {row} of a place." for row in rows],
        "key": [os.urandom(16) for _ in rows],
        "host": [f"host-{row % 977}.example" for row in rows],
        "sha256": [os.urandom(32) for _ in rows],
        "phash": [random.getrandbits(64) for _ in rows],
        "shard_row": list(range(size)),
    }
    return pa.Table.from_pydict(told, schema=LEDGER_SCHEMA)


def real_lists(
    folder: Path, sources: tuple[str, ...], *, flags: tuple[str, ...], console: Console
) -> bool:
    """Crawl published lists where no host can be reached, then what may pass once more.

    Right if every row ends, and the second run tries exactly the rows whose failure may pass.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_good = True
    for source in sources:
        out, log = folder / Path(source).stem, folder / "crawl.log"
        command = [sys.executable, str(JOBS / "crawl.py"), "--source", source, "--out", str(out)]
        command += ["--contact", CONTACT, "--no-track", *flags]
        cost = measure(command, log)
        before = _by_row(out)
        again = measure([*command, "--retry", TRANSIENT], log)
        after = _by_row(out)
        classes = Counter(str(failure or state) for state, failure, _ in before.values())
        wanted = {
            row for row, (_, name, _) in before.items() if name and find_failure(name).is_transient
        }
        tried = {row for row in before if after[row][2] != before[row][2]}
        console.print(
            f"{source}: {len(before):,} rows, exit codes {cost.code} and {again.code},"
            f" {cost.wall_s:.0f} s and again {again.wall_s:.0f} s, {cost.peak_gb:.2f} GB;"
            f" {dict(classes.most_common())}; {len(wanted):,} may pass, {len(tried):,} were tried"
        )
        is_good &= cost.code == again.code == 0 and tried == wanted
    return is_good


def _by_row(out: Path) -> dict[int, tuple[str, str | None, int]]:
    """Give state, failure and time of the last attempt of each row."""
    ledger = read_ledger(out, "row", "state", "failure", "last_at").to_pylist()
    return {row["row"]: (row["state"], row["failure"], row["last_at"]) for row in ledger}
