"""Two real processes tell each other their rows; one process alone keeps its own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from albef_core.distributed import gather_rows, is_distributed, mean_over_workers

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
    assert mean_over_workers(rows) is rows


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


def _worker(rank: int, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=NUM_WORKERS
    )
    rows = own_rows(rank)
    mean = mean_over_workers(rows["features"].detach())
    found = {
        "gathered": {kind: gather_rows(value) for kind, value in rows.items()},
        "mean": mean,
        "is untouched": torch.equal(rows["features"], own_rows(rank)["features"]),
    }
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()
