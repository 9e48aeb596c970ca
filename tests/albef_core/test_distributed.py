"""Real processes tell each other their rows; one process alone keeps its own."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from albef_core.distributed import (
    fetch_rows,
    gather_objects,
    gather_rows,
    is_distributed,
    mean_over_workers,
    own_share,
)
from albef_core.shares import share_of
from tests.processes import start_workers

NUM_WORKERS, NUM_PAIRS = 3, 7
WANTED = [6, 0, 0, 3, 2, 6, 1]


def all_rows() -> dict[str, torch.Tensor]:
    """What the workers hold together, of every kind that training gathers."""
    return {
        "features": torch.arange(7.0 * 3).reshape(7, 3),
        "image ids": torch.arange(7) + 10,
        "mask": torch.arange(7) % 3 == 0,
        "transposed": torch.arange(14.0).reshape(2, 7).T,
    }


def test_alone_every_function_is_the_identity() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert not is_distributed()
    assert own_share(5) == range(5)
    assert torch.equal(gather_rows(rows, num_pairs=2), rows)
    assert torch.equal(mean_over_workers(rows), rows)
    assert fetch_rows(rows, torch.tensor([1, 1]), num_pairs=2).tolist() == [[3, 4, 5]] * 2
    assert gather_objects("one") == ["one"]


@pytest.mark.slow
def test_three_workers_with_uneven_shares_gather_fetch_and_average(tmp_path: Path) -> None:
    start_workers(_worker, tmp_path, num=NUM_WORKERS)
    told, weights = all_rows(), torch.arange(1.0, 8.0)
    for rank in range(NUM_WORKERS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        own = share_of(rank, NUM_WORKERS, NUM_PAIRS)
        for kind, rows in found["gathered"].items():
            assert torch.equal(rows, told[kind]), kind
            assert rows.dtype == told[kind].dtype
            assert not rows.requires_grad
        assert torch.equal(found["fetched"], told["features"][WANTED[own.start : own.stop]])
        # Each use of a row, on whatever worker, sends its gradient home: here the user's weight.
        expected = torch.zeros(NUM_PAIRS).index_add(0, torch.tensor(WANTED), weights)
        assert torch.equal(found["gradient"][:, 0], expected[own.start : own.stop])
        torch.testing.assert_close(found["mean"], told["features"].sum() / NUM_WORKERS)
        assert found["ranks"] == [0, 1, 2]


def _worker(rank: int, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=NUM_WORKERS
    )
    own = own_share(NUM_PAIRS)
    rows = {kind: value[own.start : own.stop] for kind, value in all_rows().items()}
    features = rows["features"].clone().requires_grad_()
    wanted = torch.tensor(WANTED[own.start : own.stop])
    fetched = fetch_rows(features, wanted, num_pairs=NUM_PAIRS)
    weights = torch.arange(1.0, 8.0)[own.start : own.stop]
    (fetched * weights[:, None]).sum().backward()
    found = {
        "gathered": {kind: gather_rows(value, num_pairs=NUM_PAIRS) for kind, value in rows.items()},
        "fetched": fetched.detach(),
        "gradient": features.grad,
        "mean": mean_over_workers(rows["features"].sum()),
        "ranks": gather_objects(rank),
    }
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()
