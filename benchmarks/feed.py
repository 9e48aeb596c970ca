"""How fast the feed makes pairs, and how soon: `python -m benchmarks.feed --help`."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import ray
import tyro

from albef_core.config import TextConfig
from albef_core.tokenizer import Tokenizer
from pipelines.cluster import connect
from pipelines.config import AugmentConfig
from pipelines.feed import batches
from pipelines.manifest import read_captions, read_manifest
from pipelines.order import steps_per_epoch
from pipelines.pairs import FeedBatch, FeedSpec, open_corpus, prepare_block

LONG_STEPS = 10_000
"""Steps that a training has before it; the feed plans ahead for them."""


def main(
    corpus: Path,
    image_size: int = 256,
    batch_size: int = 128,
    steps: int = 30,
    task_cpus: float = 1,
    resume: bool = False,
    rounds: int = 5,
) -> None:
    """Time one worker's feed over a corpus: Ray Data tasks, and one process with their function.

    Args:
        corpus: folder written by jobs/ingest.py.
        image_size: height and width of the finished pictures in pixels.
        batch_size: pairs in a batch, each made by one task up to 256.
        steps: batches timed; the feed's steady rate leaves out the first fifth.
        task_cpus: logical CPUs of a decoding task.
        resume: time starts at an epoch's first step against starts at 90 % of it instead.
        rounds: pairs of such starts.
    """
    manifest = read_manifest(corpus)
    epoch_steps = steps_per_epoch(manifest.num_images, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.learn(chain.from_iterable(read_captions(manifest)), vocab_size=4000).save(
            Path(folder)
        )
        spec = FeedSpec(
            corpus=corpus.absolute(),
            tokenizer=folder,
            text=TextConfig(),
            augment=AugmentConfig(),
            image_size=image_size,
            mask_share=0.15,
            keep_sep=True,
            words_only=True,
            seed=0,
            batch_size=batch_size,
        )
        print(f"{corpus}: {manifest.num_images} images, {image_size} px, batch {batch_size}")
        if resume:
            connect()
            compare_starts(spec, task_cpus, late=epoch_steps * 9 // 10, rounds=rounds)
            return
        print(f"one process:     {plain_rate(spec, max(2, steps // 4)):7.0f} pairs/s")
        connect()
        for label in ("cold", "warm"):
            first_s, rate = feed_rate(spec, steps, task_cpus)
            print(f"Ray Data, {label}: {rate:9.0f} pairs/s, first batch after {first_s:.1f} s")


def plain_rate(spec: FeedSpec, steps: int) -> float:
    """Make some global batches in this process, after one that warms the caches; give pairs/s."""
    prepare_block(spec, step=0, start=0, stop=spec.batch_size)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        prepare_block(spec, step=step, start=0, stop=spec.batch_size)
    return steps * spec.batch_size / (time.perf_counter() - start)


def feed_rate(spec: FeedSpec, steps: int, task_cpus: float) -> tuple[float, float]:
    """Run the feed of one worker; give seconds to the first batch and the steady pairs/s."""
    begin = time.perf_counter()
    stream = feed_of(spec, range(steps), task_cpus)
    arrivals = [time.perf_counter() - begin for _ in stream]
    skipped = steps // 5
    seconds = arrivals[-1] - arrivals[skipped]
    return arrivals[0], (steps - 1 - skipped) * spec.batch_size / seconds if seconds else 0.0


def compare_starts(spec: FeedSpec, task_cpus: float, *, late: int, rounds: int) -> None:
    """Print seconds to the first batch of starts at step 0 and at step `late`, in turn.

    Every round has a seed of its own, so that no start finds its row groups read already.
    """
    seconds_to_first_batch(replace(spec, seed=rounds), 0, task_cpus)  # Ray starts its processes
    seconds: dict[int, list[float]] = {0: [], late: []}
    for seed in range(rounds):
        for step in sorted(seconds, reverse=bool(seed % 2)):
            spent_s = seconds_to_first_batch(replace(spec, seed=seed), step, task_cpus)
            seconds[step].append(spent_s)
    for step, spent in seconds.items():
        each = ", ".join(f"{s:.2f}" for s in spent)
        print(f"start at step {step}: first batch after {statistics.median(spent):.2f} s ({each})")
    ratio = statistics.median(seconds[late]) / statistics.median(seconds[0])
    print(f"a late start takes {ratio:.2f} times as long")


def seconds_to_first_batch(spec: FeedSpec, start: int, task_cpus: float) -> float:
    """Start the feed of a long training at some step, wait for one batch, and leave."""
    open_corpus.cache_clear()
    begin = time.perf_counter()
    stream = feed_of(spec, range(start, start + LONG_STEPS), task_cpus)
    next(stream)
    spent_s = time.perf_counter() - begin
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    time.sleep(1)  # what it had begun may end
    return spent_s


def feed_of(spec: FeedSpec, steps: range, task_cpus: float) -> Iterator[FeedBatch]:
    """Open the feed of one worker that may use all CPUs."""
    return batches(
        spec,
        start_step=steps.start,
        stop_step=steps.stop,
        rank=0,
        world_size=1,
        task_cpus=task_cpus,
        cpu_limit=ray.cluster_resources()["CPU"],
    )


if __name__ == "__main__":
    tyro.cli(main)
