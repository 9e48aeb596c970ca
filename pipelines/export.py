"""A model of ours as a checkpoint of the official code: what goes in, what has no place there."""

from dataclasses import dataclass
from pathlib import Path

from albef_core.config import ModelConfig, ObjectiveConfig, Recipe
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import LoadedModel, apply_weights, load_model, save_official
from pipelines.checkpoint import TEACHER_FILE, read_moving
from pipelines.model_store import find_model

HEAD_WIDTH = 64
"""Of an attention head in ViT-B and BERT; the file cannot say another one."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export has put into the file, in sentences, and what it could not."""

    inside: tuple[str, ...]
    not_inside: tuple[str, ...]


def export(model: str, out: Path) -> Exported:
    """Write a model folder, a run's checkpoint or a registered model as an official `ALBEF.pth`.

    A checkpoint's teacher and queues go with it under the official names. `vocab.txt` is written
    beside the file, where `load_model` looks for it.

    Raises:
        InputError: `out` exists or is no `.pth`, `vocab.txt` beside it is another model's, or the
            model is not one of ours or cannot be said in the official format.
    """
    _check_out(out)
    folder = find_model("--model", model)
    if not folder.is_dir():
        raise InputError(f"--model {model}: is a file. Only model folders of ours are exported.")
    loaded = load_model(folder)
    _check_heads(loaded.model_config, model)
    teacher, queues = _moving(folder / TEACHER_FILE, loaded.model, loaded.model_config)
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_vocabulary(loaded.tokenizer, out)
    partial = out.with_name(f"{out.name}.tmp")
    save_official(partial, loaded.model, teacher, queues, loaded.model_config)
    partial.rename(out)
    return Exported(
        inside=tuple(_inside(loaded.model, teacher, queues)),
        not_inside=tuple(_not_inside(loaded, has_teacher=teacher is not None)),
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
    file: Path, student: ALBEF, config: ModelConfig
) -> tuple[Teacher, Queues] | tuple[None, None]:
    """Read the teacher and the queues of a checkpoint; a finished model has none."""
    if not file.is_file():
        return None, None
    weights, own = read_moving(file)
    teacher = Teacher(config, student)
    apply_weights(teacher, weights, source=str(file))
    num_slots = len(own["image.image_ids"])
    queues = Queues(config, ObjectiveConfig(num_slots=num_slots), Recipe())
    queues.load_state_dict(own)
    return teacher, queues


def _write_vocabulary(tokenizer: Tokenizer, out: Path) -> None:
    file = out.with_name("vocab.txt")
    text = "\n".join(tokenizer.words(range(tokenizer.vocab_size))) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        raise InputError(
            f"--out {out}: {file} beside it is another model's vocabulary. Choose another folder."
        )
    file.write_text(text, encoding="utf-8")


def _inside(student: ALBEF, teacher: Teacher | None, queues: Queues | None) -> list[str]:
    def millions(model: ALBEF | Teacher) -> str:
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


def _not_inside(loaded: LoadedModel, *, has_teacher: bool) -> list[str]:
    lines = ["optimizer: the official Pretrain.py can start from the file, but not --resume it"]
    if not has_teacher:
        lines.append(
            "teacher and queues: the source has none, and the official Pretrain.py and Retrieval.py"
            " ask for them; a run's checkpoint folder has them"
        )
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
