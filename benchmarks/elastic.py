"""How a training takes the loss of a node, and a new one: `python -m benchmarks.elastic`.

Two nodes of one machine, each a Ray of its own; one is killed, and later replaced. Needs some 5
minutes on two cores, most of them Ray's own waits.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from fsspec.implementations.local import LocalFileSystem
from ray.cluster_utils import Cluster
from rich.console import Console

from benchmarks.training_process import Training, descendants, kill_all, make_corpus
from pipelines.checkpoint_files import DamagedCheckpointError, read_state
from pipelines.manifest import read_manifest
from pipelines.order import steps_per_epoch

TIMEOUT_S = 240.0
STORE_BYTES = 300_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained while nodes come and go."""

    batch_size: int = 16
    """Pairs in a global batch, whatever the number of workers."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    corpus: Path | None = None
    """Corpus to train on. Default: a small one is generated."""
    out: Path | None = None
    """Folder for the training. Default: a temporary one."""


class Story:
    """Says what happens, with the seconds since it began."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()

    def tell(self, sentence: str) -> None:
        """Print one line."""
        self._console.print(f"{time.monotonic() - self._started:6.1f} s  {sentence}")


def newest(training: Training) -> tuple[int, int]:
    """Give the step of the newest checkpoint, and the number of workers that wrote it."""
    states = []
    for folder in training.run_dir.glob("checkpoint-*"):
        try:
            states.append(read_state(LocalFileSystem(), str(folder)))
        except DamagedCheckpointError:  # it is being removed
            continue
    if not states:
        return 0, 0
    progress = max(states, key=lambda state: state.serial).progress
    return progress.step, progress.world_size


def wait_for(
    training: Training, driver: psutil.Popen, is_reached: Callable[[int, int], bool]
) -> tuple[int, int]:
    """Wait until the newest checkpoint is as wanted; give its step and number of workers.

    Raises:
        RuntimeError: the command has ended before, or it takes too long.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and driver.poll() is None:
        step, workers = newest(training)
        if is_reached(step, workers):
            return step, workers
        time.sleep(0.05)
    raise RuntimeError(f"it did not come to that, see {training.log}")


def run(options: Options, folder: Path, story: Story) -> None:
    """Train on two nodes, kill one, add one."""
    corpus = (options.corpus or make_corpus(folder / "corpus")).absolute()
    every = options.checkpoint_every
    epoch = steps_per_epoch(read_manifest(corpus).num_images, options.batch_size)
    flags = ("--batch-size", str(options.batch_size), "--checkpoint-every", str(every))
    # So much that a node holds one worker, and one task of the feed beside it.
    flags += ("--workers", "2", "--min-workers", "1", "--worker-cpus", "1.2", "--feed-cpus", "0.4")
    training = Training(root=folder / "training", corpus=corpus, steps=10**6, flags=flags)
    # Ray lowers its workers' priority, and these share their cores with everything else here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    driver = training.start("--checkpoint-minutes", "0", address=str(cluster.address))
    try:
        step, workers = wait_for(training, driver, lambda step, _workers: step >= every)
        story.tell(f"step {step} with {workers} workers; now a node is killed")
        cluster.remove_node(node, allow_graceful=False)
        step, workers = wait_for(training, driver, lambda _step, workers: workers == 1)
        story.tell(f"step {step} with {workers} worker; now a node is added")
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        asked, _ = wait_for(
            training, driver, lambda step, _workers: step % every > 0 < step % epoch
        )
        story.tell(f"step {asked}: a checkpoint for the larger group, between two due ones")
        step, workers = wait_for(training, driver, lambda _step, workers: workers == 2)
        story.tell(f"step {step} with {workers} workers")
        driver.terminate()
        story.tell(f"asked to stop: exit code {driver.wait(timeout=TIMEOUT_S)}")
    finally:
        kill_all([*descendants(driver), driver])
        cluster.shutdown()


def main() -> None:
    """Run the command line."""
    options, console = tyro.cli(Options, description=__doc__), Console()
    folder = options.out or Path(tempfile.mkdtemp(prefix="albef-elastic-"))
    console.print(f"training in {folder}")
    run(options, folder.absolute(), Story(console))


if __name__ == "__main__":
    main()
