"""Whether a sweep finds that distillation helps with wrong captions: `python -m benchmarks.sweep`.

Generates two corpora, one to learn from in which 40 % of the captions belong to other pictures, and
one to measure on. Sweeps alpha and learning rate against alpha 0, kills one trial and then the
command itself with -9, gives the command again, and prints its answer and the time of it all. Needs
half an hour on two cores that do nothing else.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from benchmarks.training_process import JOBS, descendants, kill_all, wait_until_gone

TRIAL = "ray::ImplicitFunc"
"""How Ray titles the process of a trial."""
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to sweep, and when to kill."""

    steps: int = 540
    """Steps of a trial that nothing stops, of 32 pairs."""
    trials: int = 12
    confirm_seeds: int = 3
    num_images: int = 4000
    num_held_out: int = 500
    wrong_captions: float = 0.4
    """Share of pictures whose caption belongs to another one."""
    trial_killed_after_s: float = 150.0
    """Seconds until one of the trials that run is killed; 0: none."""
    driver_killed_after_s: float = 210.0
    """Seconds until the command is killed; 0: it is not."""
    sweep_flags: str = ""
    """More flags for jobs/sweep.py, in one word: `--sweep-flags="--axes objective.alpha=0:1"`."""
    out: Path | None = None
    """New folder for all of it. Default: a temporary one, which is kept."""


def run(options: Options) -> None:
    """Generate, sweep with kills, and print what the sweep says."""
    out = (options.out or Path(tempfile.mkdtemp(prefix="albef-sweep-"))).absolute()
    shapes = f"--source shapes --num-images {options.num_images} --seed 3"
    ingest(out, f"{shapes} --wrong-captions {options.wrong_captions} --out {out}/train")
    ingest(out, f"--source shapes --num-images {options.num_held_out} --seed 4 --out {out}/val")
    command = f"tiny --corpus {out}/train --val {out}/val --storage {out}/runs --name noisy"
    command += f" --steps {options.steps} --trials {options.trials} --alpha 0"
    command += f" --confirm-seeds {options.confirm_seeds} {options.sweep_flags}"
    started = time.monotonic()
    driver = start(out, "sweep.py", command)
    if options.trial_killed_after_s:
        print(killed_trial(driver, started + options.trial_killed_after_s), flush=True)
    if options.driver_killed_after_s:
        wait_until(started + options.driver_killed_after_s, driver)
        family = descendants(driver)
        kill_all([driver])
        driver.wait()
        wait_until_gone(family)
        print(f"the command was killed after {time.monotonic() - started:.0f} s", flush=True)
        driver = start(out, "sweep.py", command)
    code = driver.wait()
    log = (out / "log.txt").read_text()
    print("\n".join(log.splitlines()[-(options.trials + 16) :]))
    print(f"exit code {code} after {(time.monotonic() - started) / 60:.1f} minutes; all in {out}")


def ingest(out: Path, command: str) -> None:
    """Build a corpus."""
    out.mkdir(parents=True, exist_ok=True)
    if start(out, "ingest.py", command).wait():
        raise RuntimeError(f"ingest failed, see {out}/log.txt")


def start(out: Path, job: str, command: str) -> psutil.Popen:
    """Start a job with an MLflow store of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    kept |= {"MLFLOW_TRACKING_URI": f"sqlite:///{out}/mlflow.db", "RAY_AUTH_MODE": "disabled"}
    with (out / "log.txt").open("a") as log:
        return psutil.Popen(
            [sys.executable, str(JOBS / job), *command.split()],
            env=kept,
            cwd=out,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_until(moment: float, driver: psutil.Popen) -> None:
    """Wait for a moment of the monotonic clock.

    Raises:
        RuntimeError: the command has ended before.
    """
    while time.monotonic() < moment:
        if driver.poll() is not None:
            raise RuntimeError("the sweep has ended before it was killed: kill it sooner")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def killed_trial(driver: psutil.Popen, moment: float) -> str:
    """Kill the process of a trial at about a moment."""
    wait_until(moment, driver)
    while True:
        for process in descendants(driver):
            try:
                if any(TRIAL in word for word in process.cmdline()):
                    kill_all([process])
                    return f"trial process {process.pid} was killed"
            except psutil.Error:
                continue  # it has ended
        wait_until(time.monotonic() + SECONDS_BETWEEN_LOOKS, driver)


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
