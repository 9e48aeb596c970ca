"""Real processes agree on the step, the longest caption and the end, or stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipelines.agreement import Agreed, Agreement, DisagreementError
from tests.processes import start_workers

NUM_WORKERS = 2
Told = tuple[int, int, int, bool]
"""What one worker brings: step, tokens of the longest caption, bad pictures, whether to stop."""


def test_alone_a_worker_agrees_with_itself() -> None:
    agreed = Agreement().reach(7, longest=12, num_bad=3, must_stop=True)
    assert agreed == Agreed(longest=12, num_bad=3, must_stop=True)


@pytest.mark.slow
def test_workers_share_what_their_batches_hold_and_the_wish_to_stop(
    tmp_path: Path,
) -> None:
    first, second, third = council(
        tmp_path,
        [(4, 9, 0, False), (4, 12, 0, False)],
        [(5, 30, 2, False), (5, 7, 1, False)],
        [(6, 8, 0, True), (6, 8, 1, False)],
    )
    assert first == [{"longest": 12, "num_bad": 0, "must_stop": False}] * NUM_WORKERS
    assert second == [{"longest": 30, "num_bad": 3, "must_stop": False}] * NUM_WORKERS
    assert third == [{"longest": 8, "num_bad": 1, "must_stop": True}] * NUM_WORKERS


@pytest.mark.slow
def test_workers_at_different_steps_all_stop_and_each_is_named(tmp_path: Path) -> None:
    agreed, apart = council(
        tmp_path, [(3, 9, 0, False), (3, 9, 0, False)], [(4, 9, 0, False), (5, 9, 0, True)]
    )
    assert agreed == [{"longest": 9, "num_bad": 0, "must_stop": False}] * NUM_WORKERS
    sentence = (
        "workers 0 to 1 are at steps [4, 5], not at the same one."
        " They start again from the newest checkpoint."
    )
    assert apart == [{"error": sentence}] * NUM_WORKERS


def council(out: Path, *rounds: list[Told]) -> list[list[dict[str, Any]]]:
    """Let real processes meet; give for each round what every worker learned."""
    start_workers(_worker, rounds, out, num=NUM_WORKERS)
    answers = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(NUM_WORKERS)]
    return [list(told) for told in zip(*answers, strict=True)]


def _worker(rank: int, rounds: tuple[list[Told], ...], out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=NUM_WORKERS
    )
    agreement, answers = Agreement(), []
    for told in rounds:
        step, longest, num_bad, must_stop = told[rank]
        try:
            agreed = agreement.reach(step, longest=longest, num_bad=num_bad, must_stop=must_stop)
        except DisagreementError as error:
            answers.append({"error": str(error)})
        else:
            answers.append(vars(agreed))
    torch.save(answers, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_weights_that_drift_apart_are_noticed_by_all(tmp_path: Path) -> None:
    start_workers(_holder, tmp_path, num=NUM_WORKERS)
    for rank in range(NUM_WORKERS):
        same, drifted = (tmp_path / f"{rank}.txt").read_text().split("\n")
        assert same == "agreed"
        assert "drifted apart" in drifted


def _holder(rank: int, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=NUM_WORKERS
    )
    agreement, model, answers = Agreement(), torch.nn.Linear(3, 2), []
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    for drift in (0.0, 1e-7):
        torch.nn.init.constant_(model.bias, drift * rank)
        try:
            agreement.check_replicas(model)
        except DisagreementError as error:
            answers.append(str(error))
        else:
            answers.append("agreed")
    (out / f"{rank}.txt").write_text("\n".join(answers))
    dist.destroy_process_group()
