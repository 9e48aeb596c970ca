"""Recorded steps of the official downstream models, by our names."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.official import from_official, num_text_layers, our_name, to_official
from albef_core.weights import apply_weights, model_config_of
from tests.albef_core.replay import read_json, sizes_of
from tests.albef_core.test_official import recorded_states

# float64 proves the implementation; in float32 both sides carry rounding of their own.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4}
GRADIENT_LIMITS = {torch.float64: 1e-8, torch.float32: 1e-3}
SUMS_LIMIT = 1e-6  # of sums of float32 weights after one move of the teacher


class Recording:
    """One folder: sizes, weights, tensors and scalars."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.official = load_file(folder / "checkpoint_init.safetensors")
        self.state = from_official(self.official)
        self.sizes: ModelConfig = sizes_of(self.config)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self._folder / "tensors.safetensors")

    @cached_property
    def scalars(self) -> dict[str, Any]:
        return read_json(self._folder / "scalars.json")

    def load(self, *, student: nn.Module, teacher: nn.Module | None) -> None:
        """Give models the recorded weights; every key finds its place and every place its key."""
        model = student
        if teacher is not None:
            model = nn.ModuleDict({**dict(student.named_children()), "teacher": teacher})
        report = apply_weights(model, self.state, source="recording")
        assert not report.missing
        assert not report.unexpected

    def by_our_names(self, table: Mapping[str, Any]) -> dict[str, Any]:
        layers = self.config["bert_config"]["fusion_layer"]
        ours = {our_name(key, text_layers=layers): value for key, value in table.items()}
        assert len(ours) == len(table)
        return {str(name): value for name, value in ours.items()}


def check_gradients(
    model: nn.Module, recorded: Mapping[str, float | None], dtype: torch.dtype
) -> None:
    """Compare the norm of every gradient; `dtype` is that of the less exact of the two runs.

    What lies below the rounding of the largest norm is noise: all of a key bias, whose gradient is
    zero in theory, and most of what the last layer's other tokens get.
    """
    parameters = dict(model.named_parameters())
    assert recorded.keys() == parameters.keys()
    rounding = torch.finfo(dtype).eps * max(value for value in recorded.values() if value)
    for name, value in recorded.items():
        gradient = parameters[name].grad
        assert (gradient is None) == (value is None), name
        if gradient is not None and value is not None:
            slack = GRADIENT_LIMITS[dtype] * value + rounding
            assert abs(gradient.norm().item() - value) <= slack, name


def full_size(task: str) -> tuple[dict[str, Tensor], ModelConfig]:
    """Give the keys and shapes of an official model, and the sizes that it was built with."""
    states = recorded_states()
    pretrained = model_config_of(from_official(states["pretrain"]), source="pretrain")
    state = states[task]
    num_patches = state["visual_encoder.pos_embed"].shape[1] - 1
    side = round(num_patches**0.5) * pretrained.patch_size
    return state, ModelConfig(**{**vars(pretrained), "image_size": side})


def as_official(student: nn.Module, teacher: nn.Module | None, *, like: Mapping) -> dict:
    """Translate both models' state to official names, as a checkpoint of the task has it."""
    state = dict(student.state_dict())
    if teacher is not None:
        state |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    return to_official(state, text_layers=num_text_layers(like), has_mlm_head=False)


def our_names(keys: Mapping | list[str]) -> set[str]:
    """Translate recorded keys of a full-size model; what has no name of ours is left out."""
    layers = num_text_layers(recorded_states()["pretrain"])
    return {name for key in keys if (name := our_name(key, text_layers=layers)) is not None}


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
