"""Pre-training agrees with the official code, number by number, over its recorded steps."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from albef_core.distributed import StepModel
from albef_core.official import our_name
from albef_core.pretraining import pretraining_step
from tests.albef_core.replay import (
    begin,
    forward,
    named,
    quantities,
    read_json,
    step,
    trajectory,
)
from tests.golden_folder import GOLDEN, needs_golden
from tests.processes import start_workers

PRETRAIN = GOLDEN / "pretrain"

# Largest difference allowed, over the tensor's largest value (its norm for gradients and sums).
# float64 proves the implementation; in float32 both sides carry rounding of their own, which the
# recordings measure at up to 6e-5 of a similarity.        float64: step 0, later    float32
TOLERANCES = {
    "features, similarities, targets, logits, weights": (1e-8, 1e-6, 1e-4),
    "losses": (1e-8, 1e-6, 1e-4),
    "gradients": (1e-8, 1e-6, 1e-3),
    "gradient norms": (1e-8, 1e-6, 1e-3),
    "parameters and queues": (1e-8, 1e-6, 1e-4),
}
# AdamW turns a gradient that is rounding noise into a step of up to lr, so single float32 weights
# may differ by two of them; key biases have no other gradient and are not compared.
FLOAT32_STEPS_OF_ADAMW = 2


def tolerance(kind: str, dtype: torch.dtype, number: int) -> float:
    first, later, single = TOLERANCES[kind]
    if dtype == torch.float32:
        return single
    return first if number == 0 else later


def assert_near(ours: Tensor, recorded: Tensor, limit: float, what: str) -> None:
    scale = max(recorded.double().abs().max().item(), 1e-12)
    distance = (ours.detach().double() - recorded.double()).abs().max().item()
    assert distance <= limit * scale, f"{what}: {distance:.2e} of {scale:.2e} (limit {limit:.0e})"


def recorded_tensors(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    folder = PRETRAIN / f"step_{number}"
    name = "tensors_f64" if dtype == torch.float64 else "tensors"
    return load_file(folder / f"{name}.safetensors")


def recorded_scalars(number: int, dtype: torch.dtype) -> dict:
    name = "scalars_f64" if dtype == torch.float64 else "scalars"
    return read_json(PRETRAIN / f"step_{number}" / f"{name}.json")


def num_text_layers() -> int:
    return read_json(PRETRAIN / "config.json")["bert_config"]["fusion_layer"]


def by_our_names(recorded: Mapping) -> dict:
    """Translate a recorded table of parameters; tied ones are recorded under several names."""
    layers = num_text_layers()
    ours = {our_name(key, text_layers=layers): value for key, value in recorded.items()}
    return {name: value for name, value in ours.items() if name != "mlm_head.decoder.weight"}


def is_rounding_noise(name: str) -> bool:
    return name.endswith(".key.bias")


def check_norms(parameters: Mapping[str, Tensor], recorded: Mapping, limit: float) -> None:
    total = max(value for value in recorded.values() if value is not None)
    for name, value in recorded.items():
        gradient = parameters[name].grad
        found = 0.0 if gradient is None else gradient.norm().item()
        # A gradient that is zero in theory is recorded as noise: it is held to the largest norm.
        floor = 1e-3 * total if is_rounding_noise(name) else 1e-6 * total
        assert abs(found - (value or 0.0)) <= limit * max(value or 0.0, floor), name


def check_sums(
    parameters: Mapping[str, Tensor], recorded: Mapping, limit: float, lr: float
) -> None:
    for name, (total, absolute) in recorded.items():
        ours = parameters[name].detach().double()
        slack = limit * absolute + lr * ours.numel()
        assert abs(ours.sum().item() - total) <= slack, name
        assert abs(ours.abs().sum().item() - absolute) <= slack, name


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_five_steps_agree_with_the_official_trajectory(dtype: torch.dtype) -> None:
    kind = "features, similarities, targets, logits, weights"
    for number, replay, outcome in trajectory(PRETRAIN, dtype):
        recorded, scalars = recorded_tensors(number, dtype), recorded_scalars(number, dtype)
        ours = quantities(replay, outcome)
        for name in ours.keys() & recorded.keys():
            row = "losses" if name.startswith("loss") else kind
            limit = tolerance(row, dtype, number)
            assert_near(ours[name], recorded[name], limit, f"step {number}, {name}")
        for name in ("loss_ita", "loss_itm", "loss_mlm", "loss"):
            limit = tolerance("losses", dtype, number)
            assert ours[name].item() == pytest.approx(scalars[name], rel=limit)
        check_norms(
            named(replay.student),
            by_our_names(scalars["grad_norm"]),
            tolerance("gradient norms", dtype, number),
        )
        noise = 0.0 if dtype == torch.float64 else FLOAT32_STEPS_OF_ADAMW * scalars["lr"]
        limit = tolerance("parameters and queues", dtype, number)
        after = by_our_names(scalars["param_after_sums"])
        check_sums(named(replay.student), after, limit, noise * (number + 1))
        teacher = by_our_names(scalars["momentum_after_sums"])
        teacher = {name.removeprefix("teacher."): value for name, value in teacher.items()}
        teacher.pop("mlm_head.decoder.weight", None)
        check_sums(named(replay.teacher), teacher, limit, noise)


@needs_golden
@pytest.mark.parametrize(
    ("dtype", "file"),
    [(torch.float64, "grads_f64"), (torch.float32, "grads")],
    ids=["float64", "float32"],
)
def test_every_gradient_of_the_first_step_agrees(dtype: torch.dtype, file: str) -> None:
    _, replay, _ = next(trajectory(PRETRAIN, dtype))
    recorded = by_our_names(load_file(PRETRAIN / "step_0" / f"{file}.safetensors"))
    limit = tolerance("gradients", dtype, 0)
    largest = max(gradient.norm() for gradient in recorded.values())
    parameters = named(replay.student)
    assert recorded.keys() == parameters.keys()
    for name, gradient in recorded.items():
        found = parameters[name].grad
        assert found is not None, name
        floor = 1e-3 if is_rounding_noise(name) else 1e-6
        scale = max(gradient.norm(), floor * largest)
        assert (found - gradient).norm() <= limit * scale, name


@needs_golden
def test_every_weight_after_five_steps_agrees_in_float64() -> None:
    *_, (number, replay, _) = trajectory(PRETRAIN, torch.float64)
    file = PRETRAIN / f"step_{number}" / "params_after_f64.safetensors"
    recorded = by_our_names(load_file(file))
    for name, value in named(replay.student).items():
        limit = tolerance("parameters and queues", torch.float64, number)
        assert_near(value, recorded[name], limit, name)


@needs_golden
def test_weights_after_one_float32_step_agree_but_for_rounding_noise() -> None:
    _, replay, _ = next(trajectory(PRETRAIN, torch.float32))
    recorded = by_our_names(load_file(PRETRAIN / "step_0" / "params_after.safetensors"))
    lr = replay.config["optimizer"]["lr"]
    for name, value in named(replay.student).items():
        if not is_rounding_noise(name):
            distance = (value - recorded[name]).abs().max().item()
            assert distance <= FLOAT32_STEPS_OF_ADAMW * lr, name


@needs_golden
@pytest.mark.parametrize("loss", ["loss_ita", "loss_itm", "loss_mlm"])
def test_each_loss_alone_has_the_recorded_gradient_norms(loss: str) -> None:
    replay = begin(PRETRAIN, torch.float64)
    recorded = load_file(PRETRAIN / "step_0" / "tensors.safetensors")
    model = StepModel(replay.student, pretraining_step)
    outcome = forward(replay, model, recorded, alpha=replay.config["alphas"][0])
    quantities(replay, outcome)[loss].backward()
    norms = recorded_scalars(0, torch.float32)["grad_norm_by_loss"][loss]
    check_norms(named(replay.student), by_our_names(norms), 1e-3)


@needs_golden
def test_the_temperature_is_clamped_as_recorded() -> None:
    recorded = load_file(PRETRAIN / "step_0" / "tensors.safetensors")
    for case in read_json(PRETRAIN / "temp_clamp.json"):
        replay = begin(PRETRAIN, torch.float32)
        torch.nn.init.constant_(replay.student.temperature, case["temp_before"])
        model = StepModel(replay.student, pretraining_step)
        outcome = forward(replay, model, recorded, alpha=replay.config["alphas"][0])
        outcome.itc.loss.backward()
        assert replay.student.temperature.item() == pytest.approx(case["temp_after"], rel=1e-6)
        losses = quantities(replay, outcome)
        for name in ("loss_ita", "loss_itm", "loss_mlm"):
            assert losses[name].item() == pytest.approx(case[name], rel=1e-4)
        gradient = replay.student.temperature.grad
        assert gradient is not None
        assert gradient.item() == pytest.approx(case["grad_temp_of_loss_ita"], rel=1e-3)


@needs_golden
@pytest.mark.slow
def test_two_ranks_agree_with_the_official_two_rank_run(tmp_path: Path) -> None:
    folder = GOLDEN / "pretrain_2ranks"
    num_steps = len(list(folder.glob("step_*")))
    start_workers(_rank, 2, num_steps, tmp_path, num=2)
    kind, dtype = "features, similarities, targets, logits, weights", torch.float32
    for number in range(num_steps):
        recorded = load_file(folder / f"step_{number}" / "tensors.safetensors")
        scalars = read_json(folder / f"step_{number}" / "scalars.json")
        for rank in range(2):
            ours = load_file(tmp_path / f"step-{number}-rank-{rank}.safetensors")
            for name in ours.keys() & {key.removeprefix(f"rank{rank}.") for key in recorded}:
                key = f"rank{rank}.{name}"
                own = recorded[key if key in recorded else name]
                row = "losses" if name.startswith("loss") else kind
                assert_near(ours[name], own, tolerance(row, dtype, number), f"{number}/{name}")
            norms = by_our_names(scalars["grad_norm_averaged"])
            total = max(norms.values())
            for name, norm in norms.items():
                found = ours[f"gradient.{name}"].norm().item()
                floor = 1e-3 * total if is_rounding_noise(name) else 1e-6 * total
                limit = tolerance("gradient norms", dtype, number)
                assert abs(found - norm) <= limit * max(norm, floor), name


def _rank(rank: int, world_size: int, num_steps: int, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=world_size
    )
    folder = GOLDEN / "pretrain_2ranks"
    replay = begin(PRETRAIN, torch.float32)
    model = DistributedDataParallel(StepModel(replay.student, pretraining_step))
    for number in range(num_steps):
        recorded = load_file(folder / f"step_{number}" / "tensors.safetensors")
        alpha = read_json(folder / f"step_{number}" / "scalars.json")["alpha"]
        prefix = f"rank{rank}."
        own = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        outcome = step(replay, model, own, alpha=alpha)
        found = quantities(replay, outcome)
        for name, parameter in named(replay.student).items():
            assert parameter.grad is not None, name
            found[f"gradient.{name}"] = parameter.grad
        kept = {name: value.detach().clone().contiguous() for name, value in found.items()}
        save_file(kept, out / f"step-{number}-rank-{rank}.safetensors")
    dist.destroy_process_group()
