"""How fast the feed makes pairs: Ray Data tasks against one process running the same function."""

import tempfile
import time
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
from pipelines.pairs import FeedSpec, prepare_block


def main(
    corpus: Path,
    image_size: int = 256,
    batch_size: int = 128,
    steps: int = 30,
    task_cpus: float = 1,
) -> None:
    """Time one worker's feed over a corpus.

    Args:
        corpus: folder written by jobs/ingest.py.
        image_size: height and width of the finished pictures in pixels.
        batch_size: pairs in a batch, each made by one task up to 256.
        steps: batches timed; the feed's steady rate leaves out the first fifth.
        task_cpus: logical CPUs of a decoding task.
    """
    manifest = read_manifest(corpus)
    steps_per_epoch(manifest.num_images, batch_size)
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
        print(f"one process:     {plain_rate(spec, max(2, steps // 4)):7.0f} pairs/s")
        connect()
        for label in ("cold", "warm"):
            first_s, rate = feed_rate(spec, steps, task_cpus)
            print(f"Ray Data, {label}: {rate:9.0f} pairs/s, first batch after {first_s:.1f} s")
        late_s, _ = feed_rate(
            spec, 1, task_cpus, start=steps_per_epoch(manifest.num_images, batch_size) * 9 // 10
        )
        print(f"a start at 90 % of the epoch: first batch after {late_s:.1f} s")


def plain_rate(spec: FeedSpec, steps: int) -> float:
    """Make some global batches in this process, after one that warms the caches; give pairs/s."""
    prepare_block(spec, step=0, start=0, stop=spec.batch_size)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        prepare_block(spec, step=step, start=0, stop=spec.batch_size)
    return steps * spec.batch_size / (time.perf_counter() - start)


def feed_rate(spec: FeedSpec, steps: int, task_cpus: float, start: int = 0) -> tuple[float, float]:
    """Run the feed of one worker; give seconds to the first batch and the steady pairs/s."""
    cpus = ray.cluster_resources()["CPU"]
    begin = time.perf_counter()
    arrivals = [
        time.perf_counter() - begin
        for _ in batches(
            spec,
            start_step=start,
            stop_step=start + steps,
            rank=0,
            world_size=1,
            task_cpus=task_cpus,
            cpu_limit=cpus,
        )
    ]
    skipped = steps // 5
    seconds = arrivals[-1] - arrivals[skipped]
    return arrivals[0], (steps - 1 - skipped) * spec.batch_size / seconds if seconds else 0.0


if __name__ == "__main__":
    tyro.cli(main)
