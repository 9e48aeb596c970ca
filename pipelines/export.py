"""A model of ours as a checkpoint of the official code: what goes in, what has no place there."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from albef_core.config import ModelConfig, ObjectiveConfig, Recipe
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.tasks.folder import LoadedTask, load_task
from albef_core.teacher import Teacher, frozen_copy
from albef_core.weights import (
    LoadedModel,
    apply_weights,
    load_model,
    save_official,
    task_of_model,
)
from pipelines.checkpoint import TEACHER_FILE, read_moving
from pipelines.model_store import find_model

ANSWER_LIST = "answer_list.json"
"""Beside an exported VQA model, as the official code reads it."""
HEAD_WIDTH = 64
"""Of an attention head in ViT-B and BERT; the file cannot say another one."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export has put into the file, in sentences, and what it could not."""

    inside: tuple[str, ...]
    not_inside: tuple[str, ...]
    next_command: str
    """What the file is good for."""


def export(model: str, out: Path) -> Exported:
    """Write a model folder, a run's checkpoint or a registered model as an official `.pth`.

    A checkpoint's teacher and queues go with it under the official names. `vocab.txt` is written
    beside the file, where `load_model` and `load_task` look for it, and a VQA model's list of
    answers as `answer_list.json`.

    Raises:
        InputError: `out` exists or is no `.pth`, a file beside it is another model's, or the model
            is not one of ours or cannot be said in the official format.
    """
    _check_out(out)
    folder = find_model("--model", model)
    if not folder.is_dir():
        raise InputError(f"--model {model}: is a file. Only model folders of ours are exported.")
    task = task_of_model(folder)
    loaded = load_task(folder) if task else load_model(folder)
    _check_heads(loaded.model_config, model)
    teacher, queues = _moving(folder / TEACHER_FILE, loaded.model, loaded.model_config)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = loaded.tokenizer.words(range(loaded.tokenizer.vocab_size))
    _write_beside(out, "vocab.txt", "\n".join(words) + "\n", what="vocabulary")
    if isinstance(loaded, LoadedTask) and loaded.answers:
        text = json.dumps(loaded.answers, indent=1, ensure_ascii=False) + "\n"
        _write_beside(out, ANSWER_LIST, text, what="list of answers")
    partial = out.with_name(f"{out.name}.tmp")
    save_official(partial, loaded.model, teacher, queues, loaded.model_config)
    partial.rename(out)
    return Exported(
        inside=tuple(_inside(loaded.model, teacher, queues)),
        not_inside=tuple(_not_inside(loaded, task, has_teacher=teacher is not None)),
        next_command=_next_command(loaded, task, out),
    )


def _check_out(out: Path) -> None:
    if out.suffix != ".pth":
        raise InputError(f"--out {out}: an official checkpoint is a .pth file. Name it so.")
    if out.exists():
        raise InputError(f"--out {out}: is there already. Choose another name, or remove it first.")


def _check_heads(config: ModelConfig, model: str) -> None:
    for side, width, heads in (
        ("image", config.image_width, config.image_heads),
        ("text", config.text_width, config.text_heads),
    ):
        if width != heads * HEAD_WIDTH:
            raise InputError(
                f"--model {model}: its {side} attention heads are {width // heads} wide, and an"
                f" official checkpoint, which cannot say so, is read with {HEAD_WIDTH}. Export a"
                f" model with --{side}-heads {max(1, width // HEAD_WIDTH)}."
            )


def _moving(
    file: Path, student: nn.Module, config: ModelConfig
) -> tuple[nn.Module | None, Queues | None]:
    """Read the teacher and the queues of a checkpoint; a finished model has none."""
    if not file.is_file():
        return None, None
    weights, own = read_moving(file)
    teacher = Teacher(config, student) if isinstance(student, ALBEF) else frozen_copy(student)
    apply_weights(teacher, weights, source=str(file))
    if not own:
        return teacher, None
    num_slots = len(own["image.image_ids"])
    queues = Queues(config, ObjectiveConfig(num_slots=num_slots), Recipe())
    queues.load_state_dict(own)
    return teacher, queues


def _write_beside(out: Path, name: str, text: str, *, what: str) -> None:
    file = out.with_name(name)
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"--out {out}: {file} beside it is another model's {what}. Choose another folder."
        )
    file.write_text(text, encoding="utf-8")


def _inside(student: nn.Module, teacher: nn.Module | None, queues: Queues | None) -> list[str]:
    def millions(model: nn.Module) -> str:
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights"

    lines = [f"student: {millions(student)}"]
    if teacher is not None:
        lines.append(f"teacher (`*_m`): {millions(teacher)}")
    if queues is not None:
        fill = queues.image.fill_share().item()
        lines.append(
            f"queues (`image_queue`, `text_queue`, `queue_ptr`): {len(queues.image.features):,}"
            f" slots, {fill:.0%} in use, zeros in the others"
        )
    return lines


def _not_inside(loaded: LoadedModel | LoadedTask, task: str, *, has_teacher: bool) -> list[str]:
    lines = ["optimizer: the official code can start from the file, but not --resume it"]
    if not has_teacher and not task:
        lines.append(
            "teacher and queues: the source has none, and the official Pretrain.py and Retrieval.py"
            " ask for them; a run's checkpoint folder has them"
        )
    elif not has_teacher and task != "text-assignment":
        lines.append("teacher: the source has none; a run's checkpoint folder has it")
    if isinstance(loaded, LoadedTask) and loaded.answers:
        lines.append(f"answers: {len(loaded.answers):,}, in {ANSWER_LIST} beside it")
    lines.append(f"vocabulary: {loaded.tokenizer.vocab_size:,} word pieces, in vocab.txt beside it")
    if loaded.recipe.keep_sep:
        lines.append("[SEP]: this model was trained with it, and the official code leaves it out")
    config, base = loaded.model_config, ModelConfig()
    names = ("patch_size", "image_width", "image_layers", "image_heads", "image_mlp_ratio")
    other = [name for name in names if getattr(config, name) != getattr(base, name)]
    if other:
        lines.append(
            f"sizes: {', '.join(other)} differ from ViT-B/16's, which the official code has written"
            " into its models"
        )
    return lines


def _next_command(loaded: LoadedModel | LoadedTask, task: str, out: Path) -> str:
    if task == "text-assignment":
        return f"python jobs/finetune.py nlvr2 --init {out} --corpus DIR"
    if isinstance(loaded, LoadedModel) and not loaded.report.missing:
        return f"python jobs/pretrain.py PRESET --corpus DIR --init {out}"
    answers = f" --answer-list {out.with_name(ANSWER_LIST)}" if task == "vqa" else ""
    return f"python jobs/evaluate.py {task or 'retrieval'} --model {out}{answers} --corpus DIR"
