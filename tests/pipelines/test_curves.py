"""The points of a training's curves, in the real store: rates, shares, bad pictures, means."""

import math
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient

from albef_core.errors import InputError
from pipelines.curves import Curves
from pipelines.progress import open_board
from pipelines.tracking import RunHandle, Tracker, open_run

CPU = torch.device("cpu")
LOSSES = {
    f"train/loss/{name}": torch.tensor(value)
    for name, value in (("total", 6.0), ("itc", 1.0), ("itm", 2.0), ("mlm", 3.0))
}


def curves_of(
    batch_size: int, *, max_bad_share: float = 0.1, tracker: Tracker | None = None
) -> Curves:
    return Curves(
        tracker=tracker,
        board=open_board() if tracker else None,
        shown=("train/loss/itc", "train/pairs_per_s"),
        batch_size=batch_size,
        corpus="my-corpus",
        max_bad_share=max_bad_share,
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunHandle:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return open_run("test", tmp_path / "run", run_name="r", params={}, tags={})


@pytest.mark.cluster
def test_points_hold_rates_and_shares_since_the_point_before(
    local_ray: None, run: RunHandle
) -> None:
    curves = curves_of(8, tracker=Tracker(run))
    for _ in range(2):
        curves.count([], num_bad=0, busy_s=1.5, waited_s=0.5)
    curves.write(LOSSES, {"train/alpha": 0.25}, 2, device=CPU)
    # The worker that writes may hold fewer pairs than the others: the rate is the global batch's.
    curves.count(["broken"], num_bad=1, busy_s=1.0, waited_s=0.0)
    curves.write(LOSSES | {"train/loss/itc": torch.tensor(math.nan)}, {}, 3, device=CPU)
    assert ray.get(curves.board.read.remote())[0] == 3
    curves.name_bad()
    curves.close()
    client = MlflowClient(run.uri)

    def points(name: str) -> list[tuple[int, float]]:
        return [(p.step, p.value) for p in client.get_metric_history(run.run_id, name)]

    assert points("train/pairs_per_s") == [(2, 4.0), (3, 8.0)]
    assert points("feed/wait_share") == [(2, 0.25), (3, 0.0)]
    assert points("pairs_seen") == [(2, 16.0), (3, 24.0)]
    assert points("feed/bad_images") == [(2, 0.0), (3, 1.0)]
    assert points("train/loss/total") == [(2, 6.0), (3, 6.0)]
    assert points("train/alpha") == [(2, 0.25)]
    assert [math.isnan(value) for _, value in points("train/loss/itc")] == [False, True]
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["bad_images.json"]


@pytest.mark.cluster
def test_a_checkpoint_gets_the_means_since_the_one_before_without_what_is_not_finite(
    local_ray: None, run: RunHandle
) -> None:
    curves = curves_of(8, tracker=Tracker(run))
    for step, value in enumerate([2.0, math.nan, 4.0]):
        averaged = LOSSES | {"train/loss/itc": torch.tensor(value)}
        curves.write(averaged, {"only/nan": math.nan}, step, device=CPU)
    means = curves.means_since_checkpoint()
    assert means["train/loss/itc"] == 3.0
    assert means["train/loss/itm"] == 2.0
    assert "only/nan" not in means
    assert curves.means_since_checkpoint() == {}
    curves.close()


def test_more_bad_pictures_than_their_share_stop_the_training_with_both_numbers() -> None:
    curves = curves_of(500)
    curves.count([*map(str, range(499))], num_bad=499, busy_s=1, waited_s=0)
    curves.write(LOSSES, {}, 1, device=CPU)  # 500 are too few to judge
    curves.count([], num_bad=0, busy_s=1, waited_s=0)
    message = r"my-corpus: 499 of 1000 pictures .* --max-bad-share 0\.1\. Build it again"
    with pytest.raises(InputError, match=message):
        curves.write(LOSSES, {}, 2, device=CPU)


def test_exactly_the_share_of_bad_pictures_is_borne() -> None:
    curves = curves_of(1000)
    curves.count([*map(str, range(100))], num_bad=100, busy_s=1, waited_s=0)
    curves.write(LOSSES, {}, 1, device=CPU)
    curves.count([*map(str, range(101))], num_bad=101, busy_s=1, waited_s=0)
    with pytest.raises(InputError, match="201 of 2000"):
        curves.write(LOSSES, {}, 2, device=CPU)
