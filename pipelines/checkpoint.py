"""Everything a training needs to go on: weights, teacher, queues, optimizer, and where it was.

A checkpoint is also a model folder: `albef_core.weights.load_model` reads it.
"""

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.pretraining import Queues
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import apply_weights, official_state, read_tensors, save_model
from pipelines.config import PretrainConfig
from pipelines.config_file import config_digest, write_config

TEACHER, QUEUES = "teacher.", "queues."
"""Of names in `teacher.safetensors`: the teacher's weights under official keys, the queues under
ours, because the official code keeps neither their ids nor what is valid."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The parts of a training that change with every step."""

    student: ALBEF
    teacher: Teacher
    queues: Queues
    optimizer: torch.optim.Optimizer


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    config: PretrainConfig,
    tokenizer: Tokenizer,
    step: int,
    corpus_id: str,
) -> None:
    """Write the training as it is after `step` steps; `state.json` last."""
    save_model(
        folder,
        state.student,
        model_config=config.model,
        text_config=config.text,
        recipe=config.recipe,
        tokenizer=tokenizer,
    )
    moving = official_state(state.teacher, config.model, prefix=TEACHER)
    queues = {name: tensor.cpu().contiguous() for name, tensor in state.queues.state_dict().items()}
    save_file(
        moving | {QUEUES + name: tensor for name, tensor in queues.items()},
        folder / "teacher.safetensors",
    )
    torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
    write_config(config, folder / "pretrain.json")
    versions = {name: version(name) for name in ("torch", "ray", "mlflow", "timm")}
    body = {
        "step": step,
        "pairs_seen": step * config.batch_size,
        "seed": config.seed,
        "corpus_id": corpus_id,
        "config_digest": config_digest(config),
        "versions": versions,
    }
    partial = folder / "state.json.tmp"
    partial.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(partial, folder / "state.json")  # noqa: PTH105  # the name is the point: atomic


def load_checkpoint(folder: Path, state: TrainState, *, config: ModelConfig) -> int:
    """Put a training back where a checkpoint left it; return the number of steps done."""
    student = from_official(read_tensors(folder / "model.safetensors"))
    apply_weights(state.student, student, source=str(folder))
    moving = load_file(folder / "teacher.safetensors")
    queues = {k: v for k, v in moving.items() if k.startswith(QUEUES)}
    state.queues.load_state_dict({k.removeprefix(QUEUES): v for k, v in queues.items()})
    teacher = from_official({k: v for k, v in moving.items() if k not in queues})
    teacher = {k.removeprefix(TEACHER): v for k, v in teacher.items()}
    apply_weights(state.teacher, teacher, source=str(folder))
    # On the CPU: AdamW moves the moments itself, and its step counters must not live on a GPU.
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    state.optimizer.load_state_dict(saved)
    return int(json.loads((folder / "state.json").read_text())["step"])
