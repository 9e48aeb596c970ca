"""The crawler against its bars: `python -m benchmarks.crawl --what peer --peer-python PYTHON`.

peer: beside img2dataset, on a list of pictures and on one of which 30 % is faulty. kill: killed at
random moments, compared with the truth and with a crawl that nobody disturbed. memory: its peak
with and without 2,000,000 rows that are done. real: lists as published, where no host answers.

For `peer`, in a venv of its own: pip install img2dataset==1.47.0.
"""

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from benchmarks.crawl_bars import disturbed_crawl, memory_of_done_rows, real_lists
from benchmarks.crawl_peer import LEFT_OUT, side_by_side, table_of, write_outcomes
from benchmarks.crawl_rig import make_rig

PEER_LIMIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    what: Literal["peer", "kill", "memory", "real"] = "peer"
    peer_python: Path = Path("peer/bin/python")
    """Python of the venv that has img2dataset."""
    lists: tuple[Literal["healthy", "faulty"], ...] = ("healthy", "faulty")
    """Lists of `peer`."""
    num_healthy: int = 8000
    num_rows: int = 20_000
    """Rows of the faulty list, of `kill`, and of those to be fetched of `memory`."""
    num_done: int = 2_000_000
    """Rows of `memory` that are done."""
    faulty: float = 0.3
    rounds: int = 2
    """Times that both of `peer` crawl, in turn."""
    kills: int = 5
    sources: tuple[str, ...] = ()
    """Lists of `real`."""
    crawl_flags: str = ""
    """More flags for jobs/crawl.py, in one word: `--crawl-flags="--backoff-s 1"`."""
    seed: int | None = None
    """Of the moments of `kill`. Default: another each time; it is printed."""
    out: Path | None = None
    """New folder for lists, crawls and logs. Default: a temporary one, kept if something is
    wrong."""
    json: Path | None = None
    """File for the numbers of `peer`."""


def peer(options: Options, folder: Path, console: Console) -> bool:
    """Compare with img2dataset; right if no good picture is lost and none is stored wrongly."""
    found = {}
    sizes = {"healthy": (options.num_healthy, 0.0), "faulty": (options.num_rows, options.faulty)}
    for name in options.lists:
        num_rows, faulty = sizes[name]
        rig = make_rig(folder / name, num_rows=num_rows, faulty=faulty, without=LEFT_OUT)
        found[name] = side_by_side(
            rig,
            peer_python=options.peer_python.absolute(),
            rounds=options.rounds,
            flags=tuple(options.crawl_flags.split()),
            limit_s=PEER_LIMIT_S,
        )
        console.print(table_of(f"{name}: {num_rows:,} rows", found[name]))
        for one in found[name]:
            console.print(f"{one.who}: lost {one.lost_faults}, wrongly {one.wrong_faults}")
    if options.json is not None:
        write_outcomes(options.json, found)
    ours = [one for outcomes in found.values() for one in outcomes if one.who == "crawl"]
    return all(one.cost.code == 0 and not one.lost and not one.wrong for one in ours)


def main() -> None:
    """Run the command line."""
    options, console = tyro.cli(Options, description=__doc__), Console(width=120, soft_wrap=True)
    folder = options.out or Path(tempfile.mkdtemp(prefix="albef-crawl-"))
    folder = folder.absolute()
    flags = tuple(options.crawl_flags.split())
    seed = random.randrange(10**6) if options.seed is None else options.seed
    console.print(f"in {folder}")
    match options.what:
        case "peer":
            is_good = peer(options, folder, console)
        case "kill":
            console.print(f"--seed {seed}")
            rig = make_rig(folder / "rig", num_rows=options.num_rows, faulty=options.faulty)
            is_good = disturbed_crawl(
                rig, kills=options.kills, rng=random.Random(seed), flags=flags, console=console
            )
        case "memory":
            rig = make_rig(folder / "rig", num_rows=options.num_rows, faulty=0.0)
            is_good = memory_of_done_rows(
                rig, num_done=options.num_done, flags=flags, console=console
            )
        case "real":
            is_good = real_lists(folder, options.sources, flags=flags, console=console)
    if not is_good:
        console.print(f"Something is wrong; all of it is in {folder}")
        raise SystemExit(1)
    if options.out is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
