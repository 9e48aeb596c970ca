"""Two real processes tell each other their rows; one process alone keeps its own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from albef_core.distributed import (
    gather_rows,
    is_distributed,
    mean_over_workers,
    rows_of_others,
)
from albef_core.feature_queue import FeatureQueue
from albef_core.objectives.itc import gather_keys, itc_loss, itc_targets, similarities

NUM_WORKERS = 2


def own_rows(rank: int) -> dict[str, torch.Tensor]:
    """What each worker has to tell, of every kind that training gathers."""
    features = torch.arange(6.0).reshape(2, 3) + 100 * rank
    return {
        "features": features.requires_grad_(),
        "image ids": torch.tensor([1, 2]) + 10 * rank,
        "mask": torch.tensor([True, False]),
        "transposed": torch.arange(4.0).reshape(2, 2).T + rank,
    }


def test_alone_every_function_is_the_identity() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert not is_distributed()
    assert gather_rows(rows) is rows
    assert len(rows_of_others(rows)) == 0
    assert mean_over_workers(rows) is rows


def itc_of(first: int, stop: int, *, elsewhere: bool) -> torch.Tensor:
    """ITC of pairs first to stop of four; photograph 7 occurs in both halves."""
    generator = torch.Generator().manual_seed(0)
    queries, teacher, in_queue = torch.nn.functional.normalize(
        torch.randn(3, 4, 5, generator=generator), dim=-1
    )
    image_ids = torch.tensor([7, 1, 2, 7])
    queue = FeatureQueue(6, 5)
    queue.push(in_queue, torch.tensor([1, 30, 31, 32]))
    own, ids = teacher[first:stop], image_ids[first:stop]
    others = (rows_of_others(own), rows_of_others(ids)) if elsewhere else None
    keys = gather_keys(own, queue, ids, image_id_positives=True, elsewhere=others)
    similarity = similarities(queries[first:stop], keys, torch.tensor(0.1))
    return itc_loss(similarity, itc_targets(similarity, keys.is_positive, alpha=0.3))


@pytest.mark.slow
def test_two_workers_gather_rows_by_rank_and_average(tmp_path: Path) -> None:
    start_processes(_worker, args=(tmp_path,), nprocs=NUM_WORKERS, start_method="spawn")
    told = [own_rows(rank) for rank in range(NUM_WORKERS)]
    for rank in range(NUM_WORKERS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind, rows in found["gathered"].items():
            expected = torch.cat([worker[kind].detach() for worker in told])
            assert torch.equal(rows, expected), kind
            assert rows.dtype == expected.dtype
            assert not rows.requires_grad
        expected = (told[0]["features"] + told[1]["features"]).detach() / NUM_WORKERS
        torch.testing.assert_close(found["mean"], expected)
        assert found["is untouched"]
        assert torch.equal(found["others"], told[1 - rank]["image ids"])
        torch.testing.assert_close(found["itc"], itc_of(0, 4, elsewhere=False))


def _worker(rank: int, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=NUM_WORKERS
    )
    rows = own_rows(rank)
    mean = mean_over_workers(rows["features"].detach())
    found = {
        "gathered": {kind: gather_rows(value) for kind, value in rows.items()},
        "mean": mean,
        "others": rows_of_others(rows["image ids"]),
        "itc": mean_over_workers(itc_of(2 * rank, 2 * rank + 2, elsewhere=True)),
        "is untouched": torch.equal(rows["features"], own_rows(rank)["features"]),
    }
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()
