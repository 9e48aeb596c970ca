"""Models of the tasks after pre-training: started from a pre-trained one, kept as a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.tasks.entailment import EntailmentModel, start_entailment
from albef_core.tasks.nlvr2 import Nlvr2Model, start_nlvr2
from albef_core.tasks.text_assignment import AssignmentModel, start_assignment
from albef_core.tasks.vqa import VqaModel, start_from_pretraining
from albef_core.teacher import frozen_copy
from albef_core.tokenizer import Tokenizer
from albef_core.weights import (
    WeightsReport,
    apply_weights,
    model_config_of,
    random_start,
    read_folder_config,
    read_official,
    task_of_state,
    text_of_official,
    write_folder,
)

TaskName = Literal["entailment", "vqa", "nlvr2", "text-assignment"]
MODELS: dict[TaskName, type[nn.Module]] = {
    "entailment": EntailmentModel,
    "vqa": VqaModel,
    "nlvr2": Nlvr2Model,
    "text-assignment": AssignmentModel,
}
"""Tasks whose model is not a plain ALBEF."""
QUESTION_WORDS = 50
"""Words that the published evaluation keeps of a question."""


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task's model with all that is needed to use it."""

    task: TaskName
    model: nn.Module
    """One of `MODELS`, in train mode."""
    model_config: ModelConfig
    text_config: TextConfig
    recipe: Recipe
    tokenizer: Tokenizer
    answers: tuple[str, ...]
    """The closed list that a VQA model ranks; empty for other tasks."""


def start_task(
    task: TaskName,
    config: ModelConfig,
    pretrained: Mapping[str, Tensor] | None,
    *,
    recipe: Recipe,
    source: str,
) -> tuple[nn.Module, nn.Module | None, WeightsReport]:
    """Build student and teacher of a task from a pre-trained ALBEF (ALBEF section 4).

    NLVR2 may start from text assignment as well, which itself has no teacher.

    Args:
        task: which.
        config: sizes; position embeddings are interpolated to its resolution.
        pretrained: weights by our names; None: a random start, as a measure of what they are worth.
        recipe: which flaws of the published code are mended.
        source: where the weights are from, for the report and for errors.

    Raises:
        InputError: the weights do not fit.
    """
    if task == "text-assignment":
        student = AssignmentModel(config)
        if pretrained is None:
            return student, None, random_start(student)
        return student, None, start_assignment(student, pretrained, source=source)
    if pretrained is None:
        student = MODELS[task](config)
        return student, frozen_copy(student), random_start(student)
    if task == "entailment":
        student = EntailmentModel(config)
        return student, *start_entailment(student, pretrained, source=source)
    if task == "nlvr2":
        student = Nlvr2Model(config)
        return student, *start_nlvr2(student, pretrained, source=source, recipe=recipe)
    student = VqaModel(config)
    report = start_from_pretraining(student, pretrained, source=source)
    return student, frozen_copy(student), report


def save_task(
    folder: Path,
    model: nn.Module,
    *,
    task: TaskName,
    model_config: ModelConfig,
    text_config: TextConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    answers: tuple[str, ...] = (),
) -> None:
    """Write `model.safetensors` (official names), `config.json` and the tokenizer."""
    more: dict[str, Any] = {"task": task}
    if answers:
        more["answers"] = list(answers)
    write_folder(
        folder,
        model,
        model_config=model_config,
        text_config=text_config,
        recipe=recipe,
        tokenizer=tokenizer,
        **more,
    )


def load_task(source: Path, *, device: str | torch.device = "cpu") -> LoadedTask:
    """Load a folder that `save_task` wrote, or an official checkpoint of a task.

    What an official file is for is read off its head. It says neither its tokenizer nor its heads,
    which are as `load_model` takes them, and has no list of answers.

    Raises:
        InputError: it is no model of a task, or damaged.
    """
    if source.is_file():
        return _load_official(source, device)
    config, text, recipe, more = read_folder_config(source)
    task = _check_task(more.get("task", ""), source)
    model = MODELS[task](config)
    weights = source / "model.safetensors"
    apply_weights(model, read_official(weights), source=str(weights))
    return LoadedTask(
        task=task,
        model=model.to(device),
        model_config=config,
        text_config=text,
        recipe=recipe,
        tokenizer=Tokenizer.load(source),
        answers=tuple(more.get("answers", ())),
    )


def _load_official(file: Path, device: str | torch.device) -> LoadedTask:
    state = read_official(file)
    task = _check_task(task_of_state(state), file)
    config = model_config_of(state, source=str(file))
    model = MODELS[task](config)
    apply_weights(model, state, source=str(file), may_add=("teacher.",))
    text = replace(
        text_of_official(file),
        # The published evaluation cuts no tokens.
        max_words=QUESTION_WORDS if task == "vqa" else TextConfig().max_words,
        max_tokens=config.max_positions,
    )
    return LoadedTask(
        task=task,
        model=model.to(device),
        model_config=config,
        text_config=text,
        recipe=Recipe(keep_sep=False),  # trained without [SEP]
        tokenizer=Tokenizer.load(text.tokenizer),
        answers=(),
    )


def _check_task(task: str, source: Path) -> TaskName:
    for known in MODELS:
        if task == known:
            return known
    raise InputError(
        f"{source}: a model that is not fine-tuned for any of {', '.join(MODELS)}."
        " Fine-tune it with jobs/finetune.py."
    )
