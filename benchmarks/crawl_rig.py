"""What the crawl benchmarks stand on: a fault server in a process of its own, and the crawler."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipelines.crawl_store import LEDGER_FOLDER, OK, PENDING, Crawl, read_crawl

JOBS = Path(__file__).parents[1] / "jobs"
START_TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A list of the fault server's URLs with its truth."""

    folder: Path
    port: int
    flags: tuple[str, ...]

    @property
    def listed(self) -> Path:
        """The list, TSV."""
        return self.folder / "list.tsv"

    @property
    def truth(self) -> Path:
        """What must become of each row."""
        return self.folder / "truth.parquet"

    def rows(self) -> list[dict[str, Any]]:
        """Read the truth."""
        return pq.read_table(self.truth).to_pylist()

    def served(self) -> dict[str, int]:
        """Ask the server which answers it has sent whole, and how often."""
        url = f"http://127.0.0.1:{self.port}/counts"
        with urllib.request.urlopen(url, timeout=START_TIMEOUT_S) as answer:
            return json.load(answer)["served"]


def make_rig(folder: Path, *, num_rows: int, faulty: float, without: tuple[str, ...] = ()) -> Rig:
    """Write a list and its truth, for a port that was free just now."""
    folder.mkdir(parents=True)
    flags = ["--num-rows", str(num_rows), "--faulty", str(faulty)]
    flags += ["--without", *without] if without else []
    rig = Rig(folder=folder, port=0, flags=tuple(flags))
    with _process(rig, "--list", str(rig.listed), "--truth", str(rig.truth)) as port:
        return Rig(folder=folder, port=port, flags=rig.flags)


@contextmanager
def serving(rig: Rig) -> Iterator[None]:
    """Run the rig's server, that has seen no request yet, until the block ends."""
    with _process(rig):
        yield


@contextmanager
def _process(rig: Rig, *flags: str) -> Iterator[int]:
    command = [sys.executable, "-m", "pipelines.fault_server", "--port", str(rig.port)]
    with subprocess.Popen(
        [*command, *rig.flags, *flags], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the server has ended at its start, see above")
            yield int(url.rpartition(":")[2])
        finally:
            process.kill()


def crawl_command(source: Path, out: Path, *flags: str) -> list[str]:
    """Give the command that crawls a list from loopback."""
    command = [sys.executable, str(JOBS / "crawl.py"), "--source", str(source), "--out", str(out)]
    return [*command, "--allow-private-hosts", "--no-track", *flags]


def ended_rows(out: Path) -> dict[tuple[int, int], str]:
    """Give the state of each row that a crawl has committed, by partition and place in its ledger.

    Works at any moment: while the crawl runs, and when it was killed.
    """
    try:
        crawl = read_crawl(out)
    except ValueError:
        return {}
    found: dict[tuple[int, int], str] = {}
    for partition in range(crawl.num_partitions):
        states = _states(crawl, partition)
        found |= {(partition, place): state for place, state in states.items() if state != PENDING}
    return found


def _states(crawl: Crawl, partition: int) -> dict[int, str]:
    # The journal first: a fold in between brings its rows into the ledger, and loses none.
    told: dict[int, str] = {}
    for file in sorted(crawl.journal(partition).glob("*.parquet")):
        try:
            table = pq.read_table(file, columns=["position", "state"])
        except FileNotFoundError:
            continue  # folded meanwhile
        told.update(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    path = crawl.ledger(partition)
    if path.exists():
        listed = pq.read_table(path, columns=["state"])["state"].to_pylist()
        told = dict(enumerate(listed)) | told
    return told


def stored_urls(out: Path) -> list[str]:
    """List the URLs, as listed, whose pictures a crawl has committed."""
    crawl, found = read_crawl(out), []
    for partition in range(crawl.num_partitions):
        if crawl.ledger(partition).exists():
            urls = pq.read_table(crawl.ledger(partition), columns=["url"])["url"].to_pylist()
            found += [urls[i] for i, s in _states(crawl, partition).items() if s == OK]
    return found


def read_ledger(out: Path, *columns: str) -> pa.Table:
    """Read the ledger of a crawl that has ended."""
    return ds.dataset(out / LEDGER_FOLDER, format="parquet").to_table(columns=list(columns))
