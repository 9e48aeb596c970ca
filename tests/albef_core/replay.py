"""Replays a recorded pre-training of the official code: same weights, inputs and draws."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, OptimConfig, paper_2021
from albef_core.distributed import StepModel, world_size
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.optim import adamw
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from albef_core.weights import apply_weights


@dataclass
class Replay:
    """Student, teacher, queues and optimizer as a recording begins."""

    config: dict[str, Any]
    sizes: ModelConfig
    student: ALBEF
    teacher: Teacher
    queues: Queues
    optimizer: torch.optim.Optimizer


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sizes_of(config: dict[str, Any]) -> ModelConfig:
    """Read the sizes of a recording off its own configuration."""
    bert = config["bert_config"]
    return ModelConfig(
        image_size=config["image_res"],
        patch_size=config["patch_size"],
        image_width=config["vision_width"],
        image_layers=config["vision_depth"],
        image_heads=config["vision_heads"],
        image_mlp_ratio=float(config["vision_mlp_ratio"]),
        text_width=bert["hidden_size"],
        text_heads=bert["num_attention_heads"],
        text_mlp_width=bert["intermediate_size"],
        text_layers=bert["fusion_layer"],
        fusion_layers=bert["num_hidden_layers"] - bert["fusion_layer"],
        vocab_size=bert["vocab_size"],
        max_positions=bert["max_position_embeddings"],
        feature_size=config["embed_dim"],
        dropout=0.0,
    )


def begin(folder: Path, dtype: torch.dtype) -> Replay:
    """Build everything from the recording in `folder` (`pretrain`)."""
    config = read_json(folder / "config.json")
    sizes = sizes_of(config)
    state = from_official(load_file(folder / "checkpoint_init.safetensors"))
    student = ALBEF(sizes).train()
    queue_or_teacher = ("teacher.", "queues.")
    apply_weights(student, state, source="recording", may_add=queue_or_teacher)
    teacher = Teacher(sizes, student).train()
    own = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
    apply_weights(teacher, own, source="recording")
    objective = ObjectiveConfig(num_slots=config["queue_size"])
    queues = Queues(sizes, objective, paper_2021())
    for queue, name in ((queues.image, "image"), (queues.text, "text")):
        queue.features.copy_(state[f"queues.{name}.features"])
        queue.pointer.copy_(state["queues.pointer"][0])
    for module in (student, teacher, queues):
        module.to(dtype)
    recorded = config["optimizer"]
    optim = OptimConfig(lr=recorded["lr"], weight_decay=recorded["weight_decay"], min_lr=0.0)
    optimizer = adamw(student, optim, decay_weights_only=paper_2021().decay_weights_only)
    return Replay(config, sizes, student, teacher, queues, optimizer)


def batch_of(recorded: dict[str, Tensor], dtype: torch.dtype) -> PairBatch:
    """Take the inputs of a recorded step, masking included; every pair has an image of its own."""
    return PairBatch(
        images=recorded["image"].to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        masked_ids=recorded["mlm_input_ids"],
        mlm_labels=recorded["mlm_labels"],
        image_ids=torch.arange(len(recorded["image"])),
        num_global=len(recorded["image"]) * world_size(),
    )


def forward(
    replay: Replay, model: torch.nn.Module, recorded: dict[str, Tensor], *, alpha: float
) -> PretrainingStep:
    """Give the losses of a recorded step, with its inputs and draws."""
    draws = iter([recorded["neg_image_idx"], recorded["neg_text_idx"]])
    replay.student.clamp_temperature()
    replay.teacher.follow(replay.student, momentum=replay.config["momentum"])
    return model(
        replay.teacher,
        replay.queues,
        batch_of(recorded, replay.student.temperature.dtype),
        alpha=alpha,
        recipe=paper_2021(),
        draw=lambda _weights, _uniforms: next(draws),
    )


def step(
    replay: Replay, model: torch.nn.Module, recorded: dict[str, Tensor], *, alpha: float
) -> PretrainingStep:
    """Take one optimizer step; gradients are left to look at."""
    outcome = forward(replay, model, recorded, alpha=alpha)
    replay.optimizer.zero_grad()
    outcome.loss.backward()
    replay.optimizer.step()
    push_step(replay.queues, outcome, num_pairs=len(recorded["image"]) * world_size())
    return outcome


def trajectory(folder: Path, dtype: torch.dtype) -> Iterator[tuple[int, Replay, PretrainingStep]]:
    """Walk through all recorded steps; after each, look at the replay as it then is."""
    replay = begin(folder, dtype)
    model = StepModel(replay.student, pretraining_step)
    for number, alpha in enumerate(replay.config["alphas"]):
        recorded = load_file(folder / f"step_{number}" / "tensors.safetensors")
        yield number, replay, step(replay, model, recorded, alpha=alpha)


def quantities(replay: Replay, outcome: PretrainingStep) -> dict[str, Tensor]:
    """Name what a step gave as the recordings name it."""
    itc, itm, mlm = outcome.itc, outcome.itm, outcome.mlm
    return {
        "image_feat": outcome.image_features,
        "text_feat": outcome.text_features,
        "image_feat_m": outcome.teacher_image_features,
        "text_feat_m": outcome.teacher_text_features,
        "sim_i2t": itc.i2t,
        "sim_t2i": itc.t2i,
        "sim_i2t_m": itc.teacher_i2t,
        "sim_t2i_m": itc.teacher_t2i,
        "sim_i2t_targets": itc.i2t_targets,
        "sim_t2i_targets": itc.t2i_targets,
        "loss_i2t": itc.i2t_loss,
        "loss_t2i": itc.t2i_loss,
        "loss_ita": itc.loss,
        "loss_itm": itm.loss,
        "loss_mlm": mlm.losses.total,
        "loss_mlm_ce": mlm.losses.labels,
        "loss_mlm_distill": mlm.losses.teacher,
        "loss": outcome.loss,
        "weights_i2t": itm.text_weights,
        "weights_t2i": itm.image_weights,
        "itm_logits": itm.logits,
        "itm_labels": itm.labels,
        "mlm_logits_masked": mlm.logits,
        "mlm_logits_m_masked": mlm.teacher_logits,
        "mlm_soft_labels_masked": mlm.teacher_logits.softmax(dim=1),
        "image_queue_after": replay.queues.image.features.T,
        "text_queue_after": replay.queues.text.features.T,
        "queue_ptr_after": replay.queues.image.pointer[None],
    }


def named(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())
