"""Fixtures for every test: one local Ray, small corpora, one thread of arithmetic a process."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before numpy, torch or Ray are imported: data tasks of two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_worker_niceness", "0")

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from albef_core.config import TextConfig
from albef_core.tokenizer import Tokenizer
from pipelines.config import AugmentConfig
from pipelines.manifest import (
    Manifest,
    content_id,
    read_captions,
    write_manifest,
    write_shard,
)
from pipelines.pairs import FeedSpec

CPUS = 2
OBJECT_STORE_BYTES = 1_000_000_000
RAY_WARNINGS = (
    # Ray 2.60 sets its own deprecated options whenever it makes a data set's context.
    r"ignore:`(use_\w+|target_shuffle_max_block_size)` is deprecated",
)


# Other processes share the cores, so how long a case takes says nothing.
settings.register_profile(
    "busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy-machine")


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what Ray itself does wrong; any other warning stays an error."""
    for line in RAY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that train through Ray first: they last longest, and two processes share the work.

    Of the rest there are many short ones, so that both processes end together.
    """
    training = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: item.path not in training)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one Ray with two CPUs for all tests of the session; stop it at the end."""
    import ray

    ray.init(
        address="local",  # never one that somebody else has started on this machine
        num_cpus=CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def joined_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs that a test starts join the session's Ray: another one takes ten seconds."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@dataclass(frozen=True)
class SmallCorpus:
    """A corpus of small pictures, and a vocabulary learned from its captions."""

    folder: Path
    tokenizer: Path
    num_images: int


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SmallCorpus]:
    """Give a function that writes a corpus of some 40x40 JPEGs with two captions each."""

    def make(
        num_images: int, *, broken: Collection[int] = (), uncaptioned: Collection[int] = ()
    ) -> SmallCorpus:
        """Write it in 16-row groups; `broken` pictures are cut short, others have no caption."""
        root = tmp_path_factory.mktemp("corpus")
        rows = [picture_row(number) for number in range(num_images)]
        for number in broken:
            rows[number]["image"] = rows[number]["image"][:200]
        for number in uncaptioned:
            rows[number]["captions"] = []
        manifest = write_corpus(root / "corpus", rows, rows_per_shard=120, rows_per_group=16)
        captions = (caption for captions in read_captions(manifest) for caption in captions)
        Tokenizer.learn(captions, vocab_size=300).save(root / "tokenizer")
        return SmallCorpus(root / "corpus", root / "tokenizer", num_images)

    return make


@pytest.fixture(scope="session")
def small_corpus(make_corpus: Callable[..., SmallCorpus]) -> SmallCorpus:
    """A corpus of 203 pictures in two shards; nothing convenient divides it."""
    return make_corpus(203)


def picture_row(number: int) -> dict[str, Any]:
    """Make a corpus row whose picture and captions depend on its number alone."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (40, 40), interpolation=cv2.INTER_CUBIC)
    image = cv2.imencode(".jpg", pixels)[1].tobytes()
    colors = rng.choice(["red", "green", "blue", "gray"], 2)
    return {
        "image": image,
        "image_id": f"picture-{number:03d}",
        "captions": [f"A {colors[0]} square, number {number}.", f"{colors[1]} picture {number}"],
        "width": 40,
        "height": 40,
        "source": "test",
        "url": None,
        "sha256": hashlib.sha256(image).digest(),
        "phash": number,
        "split": None,
        "annotations": None,
    }


def write_corpus(
    folder: Path, rows: list[dict[str, Any]], *, rows_per_shard: int, rows_per_group: int
) -> Manifest:
    """Write rows as a corpus, whatever is in them."""
    shards = []
    for first in range(0, len(rows), rows_per_shard):
        part = rows[first : first + rows_per_shard]
        name = f"part-{len(shards):05d}.parquet"
        shards.append(write_shard(folder, name, part, rows_per_group=rows_per_group))
    manifest = Manifest(
        version=1,
        content_id=content_id(
            (row["image_id"], row["sha256"], row["captions"], row["annotations"]) for row in rows
        ),
        num_images=len(rows),
        num_captions=sum(len(row["captions"]) for row in rows),
        num_uncaptioned=sum(not row["captions"] for row in rows),
        rows_per_group=rows_per_group,
        sources={"test": len(rows)},
        settings={},
        tool_version="test",
        shards=tuple(shards),
        folder=folder,
    )
    write_manifest(manifest)
    return manifest


@pytest.fixture
def spec(small_corpus: SmallCorpus) -> FeedSpec:
    """What the pairs of `small_corpus` look like: 32 pixels, batches of 32."""
    return FeedSpec(
        corpus=small_corpus.folder,
        tokenizer=str(small_corpus.tokenizer),
        text=TextConfig(max_tokens=12),
        augment=AugmentConfig(crop_scale_min=0.5),
        image_size=32,
        mask_share=0.15,
        keep_sep=True,
        words_only=True,
        seed=5,
        batch_size=32,
    )
