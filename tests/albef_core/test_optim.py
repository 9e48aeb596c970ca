"""AdamW's groups and the learning rate: equal to the recorded ones, and the corrected laws."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.config import ModelConfig, OptimConfig
from albef_core.model import ALBEF
from albef_core.official import num_text_layers, our_name
from albef_core.optim import Schedule, adamw
from tests.albef_core import literal
from tests.albef_core.replay import read_json, sizes_of
from tests.golden_folder import GOLDEN, needs_golden


def groups_by_name(model: ALBEF, *, decay_weights_only: bool) -> dict[str, float]:
    """Give the weight decay of every parameter."""
    optimizer = adamw(model, OptimConfig(), decay_weights_only=decay_weights_only)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def recorded_by_name(groups: list[dict[str, Any]]) -> dict[str, float]:
    layers = num_text_layers(name for group in groups for name in group["names"])
    decays = {}
    for group in groups:
        for official in group["names"]:
            name = our_name(official, text_layers=layers)
            assert name is not None
            decays[name] = group["weight_decay"]
    return decays


@needs_golden
def test_published_groups_are_those_of_the_recording() -> None:
    config = read_json(GOLDEN / "pretrain" / "config.json")
    ours = groups_by_name(ALBEF(sizes_of(config)), decay_weights_only=False)
    assert ours == recorded_by_name(config["optimizer_groups"])


@needs_golden
def test_published_groups_at_full_size_are_those_of_the_official_model() -> None:
    with torch.device("meta"):
        model = ALBEF(ModelConfig())
    recorded = read_json(GOLDEN / "full_size" / "models.json")["pretrain"]["optimizer_groups"]
    assert groups_by_name(model, decay_weights_only=False) == recorded_by_name(recorded)


def test_corrected_groups_also_spare_what_is_no_weight(tiny_model: ALBEF) -> None:
    published = groups_by_name(tiny_model, decay_weights_only=False)
    corrected = groups_by_name(tiny_model, decay_weights_only=True)
    assert {name for name in published if published[name] != corrected[name]} == {
        "temperature",
        "image_encoder.cls_token",
        "image_encoder.pos_embed",
        "text_encoder.position_embeddings.weight",
        "text_encoder.type_embeddings.weight",
    }
    assert corrected["text_encoder.word_embeddings.weight"] > 0
    assert published.keys() == corrected.keys() == dict(tiny_model.named_parameters()).keys()


def test_a_step_without_gradient_shrinks_the_decayed_and_leaves_the_rest(
    tiny_model: ALBEF,
) -> None:
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = adamw(tiny_model, config, decay_weights_only=True)
    decays = groups_by_name(tiny_model, decay_weights_only=True)
    before = {name: value.detach().clone() for name, value in tiny_model.named_parameters()}
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in tiny_model.named_parameters():
        kept = 1 - 0.1 * 0.5 if decays[name] else 1.0
        torch.testing.assert_close(value.detach(), before[name] * kept, msg=name)


@needs_golden
def test_published_schedule_is_the_recorded_one_at_every_iteration() -> None:
    runs = read_json(GOLDEN / "schedule" / "lr.json")
    for name, run in runs.items():
        settings_ = run["schedular"]
        for case, epochs in run["cases"].items():
            steps_per_epoch = epochs[0]["iterations"]
            schedule = Schedule(
                optim=OptimConfig(
                    lr=settings_["lr"],
                    min_lr=settings_["min_lr"],
                    warmup_lr=settings_["warmup_lr"],
                    warmup_steps=100 * settings_["warmup_epochs"],
                ),
                num_steps=settings_["epochs"] * steps_per_epoch,
                steps_per_epoch=steps_per_epoch,
                per_step=False,
            )
            for recorded in epochs:
                for first, last, lr in recorded["lr_runs"]:
                    for iteration in range(first, last + 1):
                        step = recorded["epoch"] * steps_per_epoch + iteration
                        assert schedule.lr_at(step) == lr, f"{name}, {case}, step {step}"
    assert runs


@settings(max_examples=30)
@given(
    num_epochs=st.integers(1, 4),
    steps_per_epoch=st.integers(1, 350),
    warmup_epochs=st.integers(0, 4),
    warmup_lr=st.sampled_from([0.0, 1e-5, 1e-4]),
)
def test_published_schedule_equals_a_walk_through_the_published_loop(
    num_epochs: int, steps_per_epoch: int, warmup_epochs: int, warmup_lr: float
) -> None:
    rates = {"lr": 1e-4, "min_lr": 1e-5, "warmup_lr": warmup_lr}
    schedule = Schedule(
        optim=OptimConfig(warmup_steps=100 * warmup_epochs, **rates),
        num_steps=num_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        per_step=False,
    )
    walked = literal.published_rates(
        num_epochs, steps_per_epoch, warmup_epochs=warmup_epochs, **rates
    )
    found = [schedule.lr_at(step) for step in range(len(walked))]
    assert found == pytest.approx(walked, rel=1e-14)


def test_a_run_that_stops_inside_an_epoch_has_the_rates_of_the_whole_epoch() -> None:
    whole, cut = (
        Schedule(optim=OptimConfig(), num_steps=num_steps, steps_per_epoch=10, per_step=False)
        for num_steps in (30, 21)
    )
    assert [cut.lr_at(step) for step in range(21)] == [whole.lr_at(step) for step in range(21)]


def corrected_rates(num_steps: int, *, warmup_steps: int) -> list[float]:
    schedule = Schedule(
        optim=OptimConfig(warmup_steps=warmup_steps),
        num_steps=num_steps,
        steps_per_epoch=7,
        per_step=True,
    )
    return [schedule.lr_at(step) for step in range(num_steps)]


@settings(max_examples=60)
@given(num_steps=st.integers(1, 400), warmup_steps=st.integers(0, 500))
def test_corrected_schedule_rises_to_the_peak_and_falls_to_the_floor(
    num_steps: int, warmup_steps: int
) -> None:
    config = OptimConfig()
    rates = corrected_rates(num_steps, warmup_steps=warmup_steps)
    # The last step of the warm-up and the first of the cosine lie a rounding beside the peak.
    peak = next(step for step, rate in enumerate(rates) if rate >= config.lr * (1 - 1e-12))
    assert rates[0] > 0
    assert max(rates) == pytest.approx(config.lr)
    assert peak <= max(0, warmup_steps - 1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak + 1 :] == sorted(rates[peak + 1 :], reverse=True)
    assert min(rates[peak:]) >= config.min_lr
    warmup = min(warmup_steps, num_steps - 1)
    one_step = (config.lr - config.min_lr) * 1.6 / (num_steps - warmup)  # the steepest: pi / 2
    assert rates[-1] - config.min_lr <= one_step


def test_corrected_warm_up_is_a_line_that_reaches_its_peak_with_its_last_step() -> None:
    rates = corrected_rates(3000, warmup_steps=1000)
    assert rates[:1000] == pytest.approx([1e-4 * (step + 1) / 1000 for step in range(1000)])
    assert rates[2000] == pytest.approx((1e-4 + 1e-5) / 2)  # half-way down the cosine


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak(num_steps: int) -> None:
    assert max(corrected_rates(num_steps, warmup_steps=1000)) == pytest.approx(1e-4)
