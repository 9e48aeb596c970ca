"""Whether a training that is killed ends as if nothing had happened: `python -m benchmarks.kill`.

Runs the command undisturbed, then again with kills at random moments, and compares every loss and
every tensor bit for bit. Needs some 20 minutes on two cores that do nothing else.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import psutil
import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table

from benchmarks.training_process import (
    Training,
    descendants,
    is_writing,
    kill_all,
    make_corpus,
    train_workers,
    wait_until_gone,
)

CLOSE = 1e-5
"""Largest relative difference of a loss between numbers of workers."""
PREEMPTED = 75
KILLED = -9
STEP_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to kill, and how often."""

    what: tuple[Literal["worker", "driver", "writing", "sigterm", "move"], ...] = (
        "worker",
        "driver",
        "writing",
        "sigterm",
    )
    """worker, driver: kill -9 at a random step; writing: kill -9 while a checkpoint is written, of
    the worker that writes and of everything at once in turn; sigterm: to the driver; move: begun on
    4 workers, stopped, then 1, stopped, then 2."""
    times: int = 3
    """Trainings of each kind."""
    steps: int = 60
    """Steps of each training."""
    batch_size: int = 16
    """Pairs in a global batch."""
    workers: int = 2
    """Train workers, but for `move`."""
    checkpoint_every: int = 7
    """Steps between checkpoints; epochs end elsewhere."""
    corpus: Path | None = None
    """Corpus to train on. Default: a small one is generated."""
    out: Path | None = None
    """Folder for the trainings; must not hold any. Default: a temporary one, kept if a training
    differs."""
    seed: int | None = None
    """Seed of the random moments. Default: another each time; it is printed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One start of the command: how it is ended, and with which exit code."""

    act: Callable[[psutil.Popen, random.Random], None] | None = None
    """Called at a random step; None: it comes to its end by itself."""
    code: int = 0
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training was disturbed, and where it went on."""

    step: int
    """About: counted from the newest checkpoint by the time since."""
    half_written: tuple[int, ...]
    """Steps whose checkpoints a killed writer left unfinished."""
    went_on_from: int

    def __str__(self) -> str:
        return f"{self.half_written[0]}, half written" if self.half_written else str(self.step)


def disturb(training: Training, parts: tuple[Part, ...], *, every: int, seed: str) -> list[Moment]:
    """Run a training through all its parts, each but the last disturbed at a random step."""
    rng, moments = random.Random(seed), []
    num_acts = sum(part.act is not None for part in parts)
    for part in parts:
        driver = training.start(*part.flags)
        family: list[psutil.Process] = []
        try:
            if part.act is not None:
                # Late enough for a checkpoint, early enough that a stop comes before the end.
                low, span = 2 * every, (training.steps - 4 * every) / num_acts
                first = low + len(moments) * span
                step = wait_for_step(training, driver, first + rng.random() * span, every=every)
                family = descendants(driver)
                part.act(driver, rng)
                time.sleep(1)  # a write that goes on in another process may still end
                if part.code:  # otherwise Ray Train starts new workers
                    driver.wait(timeout=STEP_TIMEOUT_S)
                    wait_until_gone(family)
                half = training.unfinished_steps()
                newest = training.newest_step()
                moments.append(Moment(step=step, half_written=half, went_on_from=newest))
            training.end(driver, code=part.code)
        finally:
            kill_all([*family, *descendants(driver), driver])
    return moments


def wait_for_step(training: Training, driver: psutil.Popen, step: float, *, every: int) -> int:
    """Wait until about a step, which may lie between two checkpoints; return the step then.

    Raises:
        RuntimeError: the command has ended before.
    """
    seen, seen_at, gap_s = training.newest_step(), None, 0.0  # None: before this start's first
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while seen + every <= step or not gap_s:
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"step {step:.0f} was never reached, see {training.log}")
        newest = training.newest_step()
        if newest > seen:
            gap_s = (time.monotonic() - seen_at) / (newest - seen) if seen_at else 0.0
            seen, seen_at = newest, time.monotonic()
        time.sleep(0.005)
    rest = max(0.0, step - seen)
    time.sleep(rest * gap_s)
    return round(seen + rest)


def kill_worker(driver: psutil.Popen, rng: random.Random) -> None:
    """Kill -9 one of the train workers."""
    rng.choice(train_workers(driver)).kill()


def kill_driver(driver: psutil.Popen, rng: random.Random) -> None:
    """Kill -9 the command itself."""
    driver.kill()


def kill_writer(driver: psutil.Popen, rng: random.Random, *, with_all: bool) -> None:
    """Kill -9 the worker that writes a checkpoint, amid it; `with_all`, as if power had gone.

    Raises:
        RuntimeError: no write is caught.
    """
    workers, family = train_workers(driver), [driver, *descendants(driver)]
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while time.monotonic() < deadline and driver.poll() is None:
        for worker in workers:
            if is_writing(worker):
                kill_all([worker, *family] if with_all else [worker])
                return
    raise RuntimeError("no checkpoint was seen while it was written")


def terminate(driver: psutil.Popen, rng: random.Random) -> None:
    """Ask the command to stop, as a scheduler does."""
    driver.terminate()


WHOLE = Part()
PLANS: dict[str, tuple[tuple[Part, ...], ...]] = {
    "worker": ((Part(act=kill_worker),),),
    "driver": ((Part(act=kill_driver, code=KILLED), WHOLE),),
    "writing": (
        (Part(act=partial(kill_writer, with_all=False)),),
        (Part(act=partial(kill_writer, with_all=True), code=KILLED), WHOLE),
    ),
    "sigterm": ((Part(act=terminate, code=PREEMPTED), WHOLE),),
}
"""What each kind does; several plans are taken in turn."""


def plans_of(what: str) -> tuple[tuple[Part, ...], ...]:
    """Give the plans of one kind."""
    if what != "move":
        return PLANS[what]
    first, second = (Part(act=terminate, code=PREEMPTED, flags=workers_flags(n)) for n in (4, 1))
    return ((first, second, Part(flags=workers_flags(2))),)


def workers_flags(num_workers: int) -> tuple[str, ...]:
    """Give the flags for so many workers with a decoding task each on two logical CPUs."""
    cpus = str(min(0.5, 1 / num_workers))
    return ("--workers", str(num_workers), "--worker-cpus", cpus, "--feed-cpus", cpus)


def loss_difference(training: Training, undisturbed: Training) -> float:
    """Give the largest relative difference of a loss; 0: equal in every bit.

    Raises:
        RuntimeError: a step is missing, or there twice.
    """
    found, expected, largest = training.losses(), undisturbed.losses(), 0.0
    for name, points in expected.items():
        steps = [step for step, _ in found[name]]
        if steps != list(range(1, training.steps + 1)):
            raise RuntimeError(f"{training.root}: {name} has the steps {steps}")
        for (_, value), (_, other) in zip(found[name], points, strict=True):
            if value != other:
                largest = max(largest, abs(value - other) / abs(other))
    return largest


def differing_tensors(training: Training, undisturbed: Training) -> list[str]:
    """Name the tensors of the last checkpoint that differ in any bit."""
    found, expected = training.tensors(), undisturbed.tensors()
    names = sorted(found.keys() ^ expected.keys())
    both = sorted(found.keys() & expected.keys())
    return names + [name for name in both if not torch.equal(found[name], expected[name])]


def compare(
    training: Training, undisturbed: Training, moments: list[Moment], *, limit: float
) -> tuple[list[str], bool]:
    """Give the table's columns for a training that has ended, and whether it came out right.

    `limit` is the largest relative difference of a loss; with 0 the tensors must be equal too.
    """
    difference = loss_difference(training, undisturbed)
    others = differing_tensors(training, undisturbed)
    columns = [
        ", ".join(str(moment) for moment in moments),
        ", ".join(str(moment.went_on_from) for moment in moments),
        f"to {difference:.1e}" if difference else "equal",
        f"{len(others)} differ" if others else "equal",
    ]
    return columns, difference <= limit and not (others and limit == 0)


def run(options: Options, folder: Path, table: Table, *, seed: int) -> bool:
    """Run every training and fill the table; tell whether all came out as they must."""
    corpus = (options.corpus or make_corpus(folder / "corpus")).absolute()
    flags = ("--batch-size", str(options.batch_size), "--dropout", "0.1")
    flags += ("--checkpoint-every", str(options.checkpoint_every), "--checkpoint-minutes", "0")
    flags += workers_flags(options.workers)

    def new(name: str) -> Training:
        return Training(root=folder / name, corpus=corpus, steps=options.steps, flags=flags)

    every, started = options.checkpoint_every, time.monotonic()
    undisturbed = new("undisturbed")
    undisturbed.end(undisturbed.start())
    table.add_row("nothing", "-", "-", "-", "-", f"{time.monotonic() - started:.0f}")
    is_good = True
    for what, number in product(options.what, range(options.times)):
        training, started, plans = new(f"{what}-{number}"), time.monotonic(), plans_of(what)
        plan, limit = plans[number % len(plans)], CLOSE if what == "move" else 0.0
        try:
            moments = disturb(training, plan, every=every, seed=f"{seed} {what} {number}")
            columns, is_right = compare(training, undisturbed, moments, limit=limit)
        except (RuntimeError, psutil.Error) as error:
            columns, is_right = ["-", "-", f"failed: {error}", "-"], False
        is_good &= is_right
        table.add_row(what, *columns, f"{time.monotonic() - started:.0f}")
    return is_good


def main() -> None:
    """Run the command line."""
    options, console = tyro.cli(Options, description=__doc__), Console()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    columns = "what", "killed at step", "went on from", "losses", "tensors", "seconds"
    table = Table(*columns, title=f"{options.steps} steps, --seed {seed}")
    folder = options.out or Path(tempfile.mkdtemp(prefix="albef-kill-"))
    console.print(f"trainings in {folder}, --seed {seed}")
    with Live(table, console=console):
        is_good = run(options, folder.absolute(), table, seed=seed)
    if not is_good:
        console.print(f"Some differ; the trainings are in {folder}")
        raise SystemExit(1)
    if options.out is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
