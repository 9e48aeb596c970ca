"""Our pre-training step against the published order of work: `python -m benchmarks.against`.

Needs neither ray nor mlflow. Each has a process of its own; they take steps in turn, so that a
machine that others use slows both alike. What counts is CPU seconds a pair, user and system; the
ratio is the median over rounds. Prints one line of JSON.
"""

import json
import multiprocessing
import resource
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import tyro

from benchmarks.published_step import make_published_step
from benchmarks.step import Options as StepOptions
from benchmarks.step import machine_name, make_step, peak_memory_gb


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    preset: Literal["tiny", "small", "base"] = "base"
    batch_size: int = 4
    rounds: int = 5
    """Steps of each that count."""
    warmup: int = 1
    """Steps of each before them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of our step; the published one stays at fp32."""


def work(who: str, options: Options, pipe: Any) -> None:
    """Take a step whenever asked; answer with its CPU seconds, and at the end with the peak."""
    precision = options.precision if who == "ours" else "fp32"
    step_options = StepOptions(
        preset=options.preset, batch_size=options.batch_size, precision=precision
    )
    step = make_step(step_options)[1] if who == "ours" else make_published_step(step_options)
    while pipe.recv() == "step":
        before = _cpu_seconds()
        step()
        pipe.send(_cpu_seconds() - before)
    pipe.send(peak_memory_gb(torch.device("cpu")))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(options: Options) -> dict[str, object]:
    """Let both take steps in turn."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for who in ("published", "ours"):
        pipes[who], other = context.Pipe()
        context.Process(target=work, args=(who, options, other), daemon=True).start()
    seconds: dict[str, list[float]] = {who: [] for who in pipes}
    for number in range(options.warmup + options.rounds):
        for who, pipe in pipes.items():
            pipe.send("step")
            taken = pipe.recv()
            if number >= options.warmup:
                seconds[who].append(taken / options.batch_size)
    peaks = {}
    for who, pipe in pipes.items():
        pipe.send("end")
        peaks[who] = pipe.recv()
    ratios = [a / b for a, b in zip(seconds["published"], seconds["ours"], strict=True)]
    return asdict(options) | {
        "cpu_seconds_per_pair": {w: round(statistics.median(s), 3) for w, s in seconds.items()},
        "times_the_published": round(statistics.median(ratios), 3),
        "of_each_round": [round(ratio, 3) for ratio in ratios],
        "peak_memory_gb": {who: round(peak, 2) for who, peak in peaks.items()},
        "share_of_the_published_memory": round(peaks["ours"] / peaks["published"], 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine_name(torch.device("cpu")),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
