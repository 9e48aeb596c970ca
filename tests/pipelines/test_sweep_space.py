"""Which settings a sweep tries."""

import dataclasses
from pathlib import Path

import pytest

from albef_core.config import paper_2021
from albef_core.errors import InputError
from pipelines.presets import SWEEP, tiny
from pipelines.sweep import milestones_of
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_space import Axis, axes_of, flags_of, points_of, read_axis, with_point
from pipelines.sweep_trial import TrialPlan
from pipelines.tracking import RunHandle

ALPHA = Axis(name="objective.alpha", low=0.0, high=1.0)
RATE = Axis(name="optim.lr", low=1e-4, high=1e-2, is_log=True)
DEFAULT = {"objective.alpha": 0.4, "optim.lr": 1e-3}


def config(**changes: object) -> SweepConfig:
    return dataclasses.replace(SWEEP["tiny"](), corpus=Path("c"), val=Path("v"), **changes)


def test_alpha_and_the_rate_are_searched_where_no_axis_is_named() -> None:
    alpha, rate = axes_of(config())
    assert (alpha.name, alpha.low, alpha.high) == ("objective.alpha", 0.0, 1.0)
    assert (rate.name, rate.is_log) == ("optim.lr", True)
    lr = tiny().optim.lr
    assert (rate.low, rate.high) == pytest.approx((lr / 4, lr * 4))


@pytest.mark.parametrize(
    "changes", [{"val_at": (640,)}, {"keep_best": "val/mean_recall"}, {"register": "albef"}]
)
def test_what_trials_would_not_heed_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--milestones and at their end"):
        config(**changes)


def test_two_that_would_both_choose_settings_are_refused() -> None:
    with pytest.raises(InputError, match="--search model does not go with --scheduler pbt"):
        config(search="model", scheduler="pbt")


@pytest.mark.parametrize(
    ("text", "start", "middle", "end"),
    [
        ("objective.alpha=0:1", 0.0, 0.5, 1.0),
        ("optim.lr=1e-4:1e-2:log", 1e-4, 1e-3, 1e-2),
        ("batch_size=16:64", 16, 40, 64),
        ("batch_size=16,32,64", 16, 32, 64),
        ("recipe.global_keys=true,false", True, False, False),
        ("caption_policy=random,all", "random", "all", "all"),
    ],
)
def test_an_axis_reaches_from_end_to_end(text: str, start: object, middle: object, end: object):
    axis = read_axis(text, config())
    assert [axis.at(share) for share in (0, 0.5, 1)] == [start, middle, end]
    assert [type(axis.at(share)) for share in (0, 0.5, 1)] == [type(start)] * 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alpha=0:1", r"Did you mean objective\.alpha\?"),
        ("optim.lrr=0:1", r"Did you mean optim\.lr\?"),
        ("optim.lr=0:1:log", "a log scale has no 0"),
        ("optim.lr=1:0.1", "the lower end comes first"),
        ("optim.lr=fast,slow", "'fast' is no float"),
        ("caption_policy=a:b", "a range is LOW:HIGH"),
    ],
)
def test_an_axis_that_cannot_be_is_named(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_axis(text, config())


def test_random_points_are_the_seed_s_and_fill_the_square() -> None:
    points = points_of([ALPHA, RATE], DEFAULT, num=17, search="random", seed=3)
    assert points == points_of([ALPHA, RATE], DEFAULT, num=17, search="random", seed=3)
    assert points != points_of([ALPHA, RATE], DEFAULT, num=17, search="random", seed=4)
    assert points[0] == DEFAULT
    quarters = {(p["objective.alpha"] > 0.5, p["optim.lr"] > 1e-3) for p in points[1:]}
    assert len(quarters) == 4


def test_a_grid_has_every_value_of_a_list_and_the_ends_of_a_range() -> None:
    sizes = Axis(name="batch_size", choices=(16, 32))
    points = points_of([ALPHA, sizes], DEFAULT, num=7, search="grid", seed=0)
    assert len(points) == 7
    assert {(p["objective.alpha"], p["batch_size"]) for p in points[1:]} == {
        (alpha, size) for alpha in (0.0, 0.5, 1.0) for size in (16, 32)
    }
    with pytest.raises(InputError, match="Take at least 5"):
        points_of([ALPHA, sizes], DEFAULT, num=4, search="grid", seed=0)


def test_a_point_becomes_a_config_and_its_flags_make_it_again() -> None:
    start = tiny()
    changed = with_point(start, {"objective.alpha": 0.7, "optim.lr": 5e-4, "batch_size": 64})
    changed = dataclasses.replace(changed, corpus=Path("c"), recipe=paper_2021())
    assert flags_of(changed, start) == [
        "--corpus", "c", "--batch-size", "64", "--alpha", "0.7", "--lr", "0.0005",
        "--recipe", "paper-2021",
    ]  # fmt: skip
    with pytest.raises(InputError, match="--alpha lies between 0 and 1"):
        with_point(start, {"objective.alpha": 2.0})


def test_milestones_are_shares_of_a_trial_and_lie_before_its_end() -> None:
    eight = config(steps=8, epochs=None, batch_size=16)
    assert milestones_of(eight, num_images=64) == (16, 32, 64, 128)
    assert milestones_of(config(epochs=2, batch_size=16), num_images=70)[-1] == 2 * 4 * 16
    with pytest.raises(InputError, match="a trial ends after 128 pairs"):
        milestones_of(dataclasses.replace(eight, milestones=(128,)), num_images=64)


@pytest.mark.parametrize(
    ("scheduler", "rungs"), [("asha", [1, 3, 9, 9.5]), ("pbt", [1, 2, 3, 3.5])]
)
def test_schedulers_meet_a_trial_at_its_milestones_and_leave_its_end_alone(
    scheduler: str, rungs: list[float]
) -> None:
    plan = TrialPlan(
        config=config(scheduler=scheduler, reduction=3),
        folder=Path("f"),
        marks=(100, 200, 400, 800),
        parent=RunHandle("sqlite:///x", "r"),
    )
    seen = {pairs: plan.rung(pairs, 32) for pairs in range(32, 832, 32)}
    assert {pairs: rung for pairs, rung in seen.items() if rung is not None} == dict(
        zip((128, 224, 416, 800), rungs, strict=True)
    )
