"""The feed delivers the plan: any world, any delay, any start, any lost task, damaged pictures."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albef_core.errors import InputError
from albef_core.shares import share_of
from pipelines import feed
from pipelines.feed import FeedOrderError, batches
from pipelines.pairs import FeedBatch, FeedSpec, prepare_block

pytestmark = pytest.mark.cluster

ARRAYS = ("images", "token_ids", "masked_ids", "mlm_labels", "image_keys")
STEPS = 10  # into the second epoch: 203 images are 6 steps of 32


def read(
    spec: FeedSpec,
    *,
    start: int = 0,
    stop: int = STEPS,
    rank: int = 0,
    world_size: int = 1,
    task_cpus: float = 0.5,
) -> Iterator[FeedBatch]:
    return batches(
        spec,
        start_step=start,
        stop_step=stop,
        rank=rank,
        world_size=world_size,
        task_cpus=task_cpus,
        cpu_limit=1.0,
    )


def assert_is_the_plan(spec: FeedSpec, shares: list[list[FeedBatch]], *, start: int = 0) -> None:
    """Compare what the workers received, side by side, with global batches made in this process."""
    for step, parts in enumerate(zip(*shares, strict=True), start=start):
        expected = prepare_block(spec, step=step, start=0, stop=spec.batch_size)
        assert {part.step for part in parts} == {step}
        assert {part.epoch for part in parts} == {step // 6}
        for name in ARRAYS:
            found = np.concatenate([getattr(part, name) for part in parts])
            assert found.dtype == expected[name].dtype
            assert np.array_equal(found, expected[name]), (step, name)
        for name in ("image_ids", "captions"):
            found = [value for part in parts for value in getattr(part, name)]
            assert found == expected[name].tolist()


@pytest.fixture
def finishing_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Delay every task at random, in its own process; it leaves a file when it is done."""
    prompt, folder = feed._task, tmp_path / "finished"
    folder.mkdir()

    def late(item, *, spec):
        time.sleep(random.random() * 0.3)
        block = prompt(item, spec=spec)
        (folder / f"{item['step'][0]:03d}-{item['start'][0]:03d}").touch()
        return block

    monkeypatch.setattr(feed, "_task", late)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])  # 32 pairs are 10, 11 and 11 for three
def test_workers_receive_the_plan_together_while_tasks_finish_at_random(
    local_ray, spec, finishing_times, world_size
):
    def work(rank: int) -> list[FeedBatch]:
        # Light tasks, so that each worker has several at once, and they can overtake each other.
        return list(read(spec, stop=12, rank=rank, world_size=world_size, task_cpus=0.1))

    # Two at a time: two CPUs give each of four workers one task at once, which none overtakes.
    with ThreadPoolExecutor(min(world_size, 2)) as workers:
        shares = list(workers.map(work, range(world_size)))
    assert [len(share) for share in shares] == [12] * world_size
    overtakings = 0
    for rank, share in enumerate(shares):
        own = share_of(rank, world_size, spec.batch_size)
        assert {len(batch.captions) for batch in share} == {len(own)}
        ends = [finishing_times / f"{step:03d}-{own.start:03d}" for step in range(12)]
        overtakings += sorted(ends, key=lambda file: file.stat().st_mtime_ns) != ends
    assert overtakings, "the delays changed the order in which tasks ended"
    assert_is_the_plan(spec, shares)
    dropped = []
    for epoch in range(2):
        steps = slice(6 * epoch, 6 * epoch + 6)
        seen = [i for share in shares for batch in share[steps] for i in batch.image_ids]
        assert len(seen) == len(set(seen)) == 203 - 11
        dropped.append({f"picture-{number:03d}" for number in range(203)} - set(seen))
    assert dropped[0] != dropped[1]


def test_a_share_larger_than_a_block_is_joined_in_order(local_ray, spec):
    spec = replace(spec, rows_per_block=7)
    shares = [list(read(spec, stop=3, rank=rank, world_size=2)) for rank in range(2)]
    assert_is_the_plan(spec, shares)


def test_a_start_at_step_t_equals_the_tail_and_prepares_nothing_before_it(
    local_ray, spec, monkeypatch, tmp_path
):
    task = feed._task

    def noting(item, *, spec):
        (tmp_path / str(item["step"][0])).touch()
        return task(item, spec=spec)

    monkeypatch.setattr(feed, "_task", noting)
    assert_is_the_plan(spec, [list(read(spec, start=7))], start=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8", "9"]


def test_segments_follow_each_other_without_a_seam(local_ray, spec, monkeypatch):
    monkeypatch.setattr(feed, "BLOCKS_PER_SEGMENT", 3)
    monkeypatch.setattr(feed, "OVERLAP_STEPS", 2)
    assert_is_the_plan(spec, [list(read(spec))])


def test_a_killed_task_is_repeated_with_the_same_result(local_ray, spec, monkeypatch, tmp_path):
    task = feed._task

    def mortal(item, *, spec):
        marker = tmp_path / "killed"
        if item["step"][0] == 4 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task(item, spec=spec)

    monkeypatch.setattr(feed, "_task", mortal)
    assert_is_the_plan(spec, [list(read(spec))])
    assert (tmp_path / "killed").exists()


def test_damaged_pictures_are_counted_and_named_and_stop_nothing(local_ray, spec, make_corpus):
    corpus = make_corpus(64, broken=[5, 40])
    received = list(read(replace(spec, corpus=corpus.folder), stop=2))
    assert sum(batch.num_bad for batch in received) == 2
    bad_ids = {image_id for batch in received for image_id in batch.bad_ids}
    assert bad_ids == {"picture-005", "picture-040"}
    assert bad_ids.isdisjoint(image_id for batch in received for image_id in batch.image_ids)


def test_a_corpus_that_does_not_decode_ends_the_feed_with_one_clear_line(
    local_ray, spec, make_corpus
):
    corpus = make_corpus(64, broken=range(64))
    with pytest.raises(InputError, match="64 images in a row do not decode"):
        next(read(replace(spec, corpus=corpus.folder)))


def test_a_corpus_smaller_than_a_batch_is_refused_before_anything_starts(spec):
    with pytest.raises(InputError, match="--batch-size 256 is more than the 203 images"):
        read(replace(spec, batch_size=256))


def test_a_feed_without_steps_is_empty(spec):
    assert list(read(spec, start=STEPS)) == []


def test_a_batch_that_is_not_due_is_refused(local_ray, spec, monkeypatch):
    task = feed._task

    def confused(item, *, spec):
        swapped = {2: 3, 3: 2}.get(int(item["step"][0]), int(item["step"][0]))
        return task({**item, "step": np.array([swapped])}, spec=spec)

    monkeypatch.setattr(feed, "_task", confused)
    stream = read(spec)
    assert [next(stream).step, next(stream).step] == [0, 1]
    with pytest.raises(FeedOrderError, match=r"step 2, items 0 to 31 are due; step 3, items 0"):
        next(stream)


def test_a_feed_that_is_left_early_leaves_no_thread_running(local_ray, spec):
    stream = read(spec)
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    deadline = time.monotonic() + 10
    while _executors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _executors()


def _executors() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "StreamingExecutor" in thread.name]
