"""Weights on disk: our own folders, official checkpoints, starting weights.

Our format is safetensors with the official key names, and JSON beside it. Nothing is ever unpickled
except by `torch.load(weights_only=True)`, which makes tensors and nothing else.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.image_encoder import resize_position_embeddings
from albef_core.model import ALBEF
from albef_core.official import from_official, our_name, to_official
from albef_core.tasks.labels import LABELS
from albef_core.tokenizer import Tokenizer

FORMAT = 1
UNUSED_SLOT = -100
"""Image id of a slot not yet in use, in official retrieval checkpoints."""


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What a file of weights gave to a model, key by key."""

    source: str
    matched: int
    missing: tuple[str, ...] = ()
    """Weights of the model that the file does not hold, and that may start at random."""
    unexpected: tuple[str, ...] = ()
    """Keys of the file that the model has no place for, and that may be left."""

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.matched} matched, {len(self.missing)} missing,"
            f" {len(self.unexpected)} unexpected"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with all that is needed to use it."""

    model: ALBEF
    model_config: ModelConfig
    text_config: TextConfig
    recipe: Recipe
    tokenizer: Tokenizer
    report: WeightsReport


def save_model(
    folder: Path,
    model: ALBEF,
    *,
    model_config: ModelConfig,
    text_config: TextConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    tuned_for: str = "",
) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer into a folder.

    `tuned_for` is retrieval or grounding, where the model is fine-tuned for one of them: these have
    the same parts as a pre-trained model, and nothing else would tell.
    """
    write_folder(
        folder,
        model,
        model_config=model_config,
        text_config=text_config,
        recipe=recipe,
        tokenizer=tokenizer,
        **({"tuned_for": tuned_for} if tuned_for else {}),
    )


def write_folder(
    folder: Path,
    model: nn.Module,
    *,
    model_config: ModelConfig,
    text_config: TextConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    **more: Any,
) -> None:
    """Write the folder of any model of ours; `more` is what its task adds to `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = official_state(model, text_layers=model_config.text_layers)
    save_file(state, folder / "model.safetensors")
    config = {"format": FORMAT, "model": asdict(model_config), "text": asdict(text_config)}
    text = json.dumps(config | {"recipe": asdict(recipe)} | more, indent=2)
    (folder / "config.json").write_text(text + "\n")
    tokenizer.save(folder)


def load_model(source: str | Path, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a folder that `save_model` wrote, or an official pre-training or retrieval checkpoint.

    The model is in train mode, as every new module is: call `eval()` on it before it answers. One
    fine-tuned for retrieval or grounding has no `mlm_head`: the report names it as missing.

    An official file says nothing of its tokenizer: it is bert-base-uncased's, from the hub or from
    `vocab.txt` beside the file. Nor does it say how many heads there are: they are 64 wide. Raises
    InputError naming the file and what is wrong with it.
    """
    source = Path(source)
    if source.is_dir():
        return _load_folder(source, device)
    state = read_official(source)
    _refuse_task(source, task_of_state(state))
    config = model_config_of(state, source=str(source))
    model = ALBEF(config)
    unused = ("teacher.", "queues.")
    report = _apply_with_or_without_mlm_head(model, state, source=str(source), may_add=unused)
    text = text_of_official(source)
    return LoadedModel(
        model=model.to(device),
        model_config=config,
        text_config=text,
        recipe=Recipe(keep_sep=False),  # trained without [SEP]
        tokenizer=Tokenizer.load(text.tokenizer),
        report=report,
    )


def text_of_official(file: Path) -> TextConfig:
    """Give what an official file does not say: texts as in pre-training, and their tokenizer.

    That is bert-base-uncased's, or `vocab.txt` where one lies beside the file.
    """
    beside = file.with_name("vocab.txt")
    return TextConfig(tokenizer=str(beside)) if beside.is_file() else TextConfig()


def _refuse_task(source: Path, task: str) -> None:
    if task:
        raise InputError(
            f"{source}: a model fine-tuned for {task}, which cannot do this."
            " Give a pre-trained model, or one fine-tuned for retrieval."
        )


def _load_folder(folder: Path, device: str | torch.device) -> LoadedModel:
    config, text, recipe, more = read_folder_config(folder)
    _refuse_task(folder, more.get("task", ""))
    model = ALBEF(config)
    weights = folder / "model.safetensors"
    state = read_official(weights)
    report = _apply_with_or_without_mlm_head(model, state, source=str(weights))
    return LoadedModel(
        model=model.to(device),
        model_config=config,
        text_config=text,
        recipe=recipe,
        tokenizer=Tokenizer.load(folder),
        report=report,
    )


def _apply_with_or_without_mlm_head(
    model: ALBEF, state: Mapping[str, Tensor], *, source: str, may_add: tuple[str, ...] = ()
) -> WeightsReport:
    """Fill a model; of a file without an MLM head, as retrieval's are, it loses its own."""
    if any(name.startswith("mlm_head.") for name in state):
        return apply_weights(model, state, source=source, may_add=may_add)
    report = apply_weights(model, state, source=source, may_miss=("mlm_head.",), may_add=may_add)
    model.drop_mlm_head()
    return report


def read_folder_config(
    folder: Path,
) -> tuple[ModelConfig, TextConfig, Recipe, dict[str, Any]]:
    """Read the `config.json` of a model folder: sizes, text, recipe, and what its task added.

    Raises:
        InputError: it is absent or damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path.parent}: no config.json, so this is not a model folder of ours.")
    try:
        saved = json.loads(path.read_text())
        version = saved.pop("format")
        if version != FORMAT:
            raise ValueError(f"format {version}; this version reads {FORMAT}")  # noqa: TRY301
        sizes, text = ModelConfig(**saved.pop("model")), TextConfig(**saved.pop("text"))
        return sizes, text, Recipe(**saved.pop("recipe")), saved
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a model's configuration ({error}).") from error


def task_of_model(source: Path) -> str:
    """Name what a model folder or an official file is fine-tuned for; "" where it has ITC and ITM.

    Raises:
        InputError: it is no model, or damaged.
    """
    if source.is_file():
        return task_of_state(read_official(source))
    *_, more = read_folder_config(source)
    return more.get("task", "")


def is_fine_tuned(folder: Path) -> bool:
    """Tell whether a model folder of ours is fine-tuned, for retrieval and grounding too."""
    *_, more = read_folder_config(folder)
    return "task" in more or "tuned_for" in more


def official_state(model: nn.Module, *, text_layers: int, prefix: str = "") -> dict[str, Tensor]:
    """Give a student's or teacher's weights their official names, each tensor once and on the CPU.

    `text_layers` is how many layers the text encoder has, `prefix` is `teacher.` for a teacher.
    What the official files repeat (the decoder that is the word embedding) or can be counted out
    (position ids) is left away.
    """
    parameters = {
        prefix + name: p.detach().cpu().contiguous() for name, p in model.named_parameters()
    }
    has_mlm_head = any("mlm_head." in name for name in parameters)
    official = to_official(parameters, text_layers=text_layers, has_mlm_head=has_mlm_head)
    repeated = ("position_ids", "cls.predictions.bias")
    return {key: tensor for key, tensor in official.items() if not key.endswith(repeated)}


def save_official(
    path: Path,
    student: nn.Module,
    teacher: nn.Module | None,
    queues: Queues | None,
    config: ModelConfig,
) -> None:
    """Write a `.pth` that the official code loads: all keys of the model's task, under `model`.

    Without a teacher or queues their keys are left away. The ids of the queues have a place in
    retrieval's files alone, which are those without an MLM head.
    """
    state = dict(student.state_dict())
    if teacher is not None:
        state |= {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}
    if queues is not None:
        state["queues.image.features"] = queues.image.features
        state["queues.text.features"] = queues.text.features
        state["queues.pointer"] = queues.image.pointer.reshape(1)
    has_mlm_head = any(name.startswith("mlm_head.") for name in state)
    if queues is not None and not has_mlm_head:
        ids = queues.image.image_ids.masked_fill(~queues.image.is_valid, UNUSED_SLOT)
        state["queues.image_ids"] = ids[None]
    official = to_official(state, text_layers=config.text_layers, has_mlm_head=has_mlm_head)
    torch.save(
        {"model": {key: tensor.cpu().contiguous() for key, tensor in official.items()}}, path
    )


def read_official(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint of the official code under our names, `checkpoint['model']` unwrapped."""
    state = read_tensors(path)
    try:
        return from_official(state)
    except KeyError as error:
        raise InputError(f"{path}: {error} is no key of an official ALBEF checkpoint.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors from safetensors, or from torch's format without its code."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise InputError(
            f"{path}: cannot be read as weights: it is cut short, damaged, of another format, or"
            f" holds more than tensors ({type(error).__name__})."
        ) from error
    while isinstance(saved, dict) and isinstance(saved.get("model"), dict):
        saved = saved["model"]
    if not isinstance(saved, dict) or not all(
        isinstance(key, str) and torch.is_tensor(value) for key, value in saved.items()
    ):
        raise InputError(f"{path}: holds no dict of tensors, neither at its top nor under 'model'.")
    return saved


def apply_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    may_miss: tuple[str, ...] = (),
    may_add: tuple[str, ...] = (),
) -> WeightsReport:
    """Copy weights into a model by our names; position embeddings are interpolated to fit.

    `may_miss` and `may_add` are parts of names that may be absent from, or left over in, the file.
    Anything else that does not fit raises InputError: a training never silently starts at random.
    """
    own = dict(model.named_parameters())
    missing = tuple(name for name in own if name not in state)
    # A parameter that the model has under two names may come under both.
    fits = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unexpected = tuple(name for name in state if name not in fits)
    bad = [f"misses {n}" for n in missing if not any(part in n for part in may_miss)]
    bad += [f"has {n}" for n in unexpected if not any(part in n for part in may_add)]
    with torch.no_grad():
        for name in [name for name in own if name in state]:
            value, shape = state[name], own[name].shape
            if name.endswith("pos_embed") and value.shape != shape and _is_square_grid(value):
                value = resize_position_embeddings(value, num_patches=shape[1] - 1)
            if value.shape == shape:
                own[name].copy_(value)
            else:
                bad.append(f"has {name} of shape {list(value.shape)}, not {list(shape)}")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(
            f"{source}: does not fit the model: it {', '.join(bad[:3])}{more}."
            " Choose the preset or sizes that the weights were made with."
        )
    num_matched = len(own) - len(missing)
    return WeightsReport(source=source, matched=num_matched, missing=missing, unexpected=unexpected)


def _is_square_grid(position_embeddings: Tensor) -> bool:
    # Not so in a distilled DeiT, which has a second token that is no patch.
    num_patches = position_embeddings.shape[1] - 1 if position_embeddings.ndim == 3 else 0
    return num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches


def task_of_state(state: Mapping[str, Tensor]) -> str:
    """Name the task whose head a checkpoint has, by our names; "" where it has ITC and ITM."""
    if any(name.startswith("answer_decoder.") for name in state):
        return "vqa"
    if "assignment_head.weight" in state:
        return "text-assignment"
    if "classifier.2.weight" not in state:
        return ""
    num_classes = len(state["classifier.2.weight"])
    return next((task for task, labels in LABELS.items() if len(labels) == num_classes), "")


def model_config_of(state: Mapping[str, Tensor], *, source: str) -> ModelConfig:
    """Read the sizes off a checkpoint's shapes; heads are 64 wide, as in ViT-B and BERT.

    Tasks without ITC have no joint feature, whose size is then the published one.
    """
    task = task_of_state(state)
    layers_a_fusion = 2 if task in ("nlvr2", "text-assignment") else 1

    def num_layers(prefix: str) -> int:
        return len({n.split(".")[2] for n in state if n.startswith(f"{prefix}.")})

    try:
        patches = state["image_encoder.patch_embed.proj.weight"]
        words = state["text_encoder.word_embeddings.weight"]
        num_patches = state["image_encoder.pos_embed"].shape[1] - 1
        image_width, patch_size = patches.shape[0], patches.shape[2]
        return ModelConfig(
            image_size=round(num_patches**0.5) * patch_size,
            patch_size=patch_size,
            image_width=image_width,
            image_layers=num_layers("image_encoder.blocks"),
            image_heads=image_width // 64,
            image_mlp_ratio=len(state["image_encoder.blocks.0.mlp.fc1.weight"]) / image_width,
            text_width=words.shape[1],
            text_heads=words.shape[1] // 64,
            text_mlp_width=len(state["text_encoder.layers.0.mlp.up.weight"]),
            text_layers=num_layers("text_encoder.layers"),
            fusion_layers=num_layers("multimodal_encoder.layers") // layers_a_fusion,
            vocab_size=len(words),
            max_positions=len(state["text_encoder.position_embeddings.weight"]),
            feature_size=(
                ModelConfig().feature_size
                if task in ("entailment", "vqa", "nlvr2")
                else len(state["image_projection.weight"])
            ),
        )
    except KeyError as error:
        raise InputError(
            f"{source}: has no {error}, which a model of this kind needs. Give a whole checkpoint."
        ) from error
    except InputError as error:
        raise InputError(f"{source}: its sizes fit no model: {error}") from error


def load_image_weights(model: ALBEF, source: str) -> WeightsReport:
    """Start the image encoder from a ViT: a file, a folder, or a timm name on the hub.

    The paper starts from DeiT's ImageNet-1k weights (section 3.1). `random` keeps the random start.
    """
    if source == "random":
        return random_start(model.image_encoder)
    path = _local_weights(source)
    state = read_tensors(path) if path else _timm_weights(source)
    return apply_weights(
        model.image_encoder,
        state,
        source=str(path or f"timm hub: {source}"),
        may_add=("head", "fc_norm", "dist_token"),
    )


def load_text_weights(model: ALBEF, source: str) -> WeightsReport:
    """Start text encoder, multimodal encoder and MLM head from BERT: a file, a folder, a hub name.

    BERT has no cross-attention: that part starts at random, as do the heads of our own. `random`
    keeps everything random.
    """
    of_bert = nn.ModuleDict(
        {
            "text_encoder": model.text_encoder,
            "multimodal_encoder": model.multimodal_encoder,
            "mlm_head": model.mlm_head,
        }
    )
    if source == "random":
        return random_start(of_bert)
    path = _local_weights(source) or _hub_file(source)
    text_layers = len(model.text_encoder.layers)
    state = {}
    for key, tensor in read_tensors(path).items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        try:
            name = our_name(f"text_encoder.{key}", text_layers=text_layers)
        except KeyError:
            name = key
        if name is not None:
            state[name] = tensor
    return apply_weights(
        of_bert,
        state,
        source=str(path),
        may_miss=("cross_attention",),
        may_add=("pooler", "seq_relationship"),
    )


def random_start(module: nn.Module) -> WeightsReport:
    """Report that a module keeps the random weights it was built with, as was asked for."""
    names = tuple(name for name, _ in module.named_parameters())
    return WeightsReport(source="random start, as asked for", matched=0, missing=names)


def _local_weights(source: str) -> Path | None:
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or source.startswith(("/", ".")):
            raise InputError(f"{source}: no such file or folder of starting weights.")
        return None
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise InputError(f"{source}: holds neither model.safetensors nor pytorch_model.bin.")


def _hub_file(name: str) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  # only when the hub is asked

    try:
        return Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:
        raise InputError(_unreachable(name, "text", error)) from error


def _timm_weights(name: str) -> dict[str, Tensor]:
    import timm  # noqa: PLC0415  # only when the hub is asked

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        raise InputError(_unreachable(name, "image", error)) from error


def _unreachable(name: str, side: str, error: Exception) -> str:
    return (
        f"{name}: its weights could not be had from the hub ({type(error).__name__})."
        f" Give a local file or folder with --{side}-weights, or `random` for a random start."
    )
