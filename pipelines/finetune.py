"""Fine-tuning from the driver's side: what is learned from, and the models that it starts from."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from albef_core.config import ModelConfig, TextConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tasks.folder import LoadedTask, load_task, save_task, start_task
from albef_core.teacher import Teacher
from albef_core.weights import (
    LoadedModel,
    WeightsReport,
    apply_weights,
    load_model,
    official_state,
    random_start,
    read_official,
    save_model,
    task_of_model,
)
from pipelines.assignment_task import AssignmentTask
from pipelines.checkpoint import TEACHER, TEACHER_FILE, read_moving
from pipelines.config import FinetuneConfig, TaskName
from pipelines.example_task import ExampleTask
from pipelines.examples import EXAMPLES_FILE, Collected, collect_examples, write_examples
from pipelines.manifest import check_captioned, read_manifest
from pipelines.model_store import find_model
from pipelines.pair_task import PairTask
from pipelines.presets import INIT
from pipelines.train import Course, TrainResult, collect_held_out, train, with_absolute_names

logger = logging.getLogger(__name__)
ON_PAIRS = ("retrieval", "grounding")
"""Tasks that learn from pairs of a picture and a text, with ITC and ITM."""
SIZE_RATIO = 1.5
"""Resolution of fine-tuning over that of pre-training; the paper: 384 over 256."""


def finetune(config: FinetuneConfig) -> TrainResult:
    """Fine-tune as the config says; a second call with the same name goes on where it was.

    Raises:
        InputError: corpus, model, resources or an earlier run do not fit the config.
        Preempted: the training was asked to stop, and left a checkpoint.
    """
    if config.init == INIT:
        raise InputError(
            "--init is missing: the model to fine-tune. Give a pre-trained model's folder, an"
            " official ALBEF.pth, or a registry URI such as models:/albef-pretrain/1."
        )
    config = with_absolute_names(config)
    manifest = read_manifest(config.corpus)
    if config.task == "text-assignment":
        check_captioned(manifest)
        if config.val:
            raise InputError(
                f"--val {config.val}: text assignment is measured by the NLVR2 that starts from it."
                " Leave it out."
            )
        course = Course(
            task=AssignmentTask,
            corpus_id=manifest.content_id,
            num_items=manifest.num_images,
            prepare=lambda config, folder: prepare_task(config, None, folder),
        )
        return train(config, course)
    collected = collect_examples(manifest, config.task)
    held_out = collect_held_out(config, config.task, manifest)
    for kind, count in collected.bad.items():
        logger.warning("%s: %d examples left out, with %s", config.corpus, count, kind)
    course = Course(
        task=PairTask if config.task in ON_PAIRS else ExampleTask,
        corpus_id=manifest.content_id,
        num_items=len(collected.table),
        prepare=lambda config, folder: prepare_task(config, collected, folder),
        held_out=held_out,
    )
    return train(config, course)


def prepare_task(
    config: FinetuneConfig, collected: Collected | None, folder: Path
) -> tuple[FinetuneConfig, dict[str, str]]:
    """Write what a task's training starts from: student, teacher, examples, list of answers.

    Text assignment has no teacher, and no examples but the corpus's captions. Where `folder` holds
    it all already, it is taken as it is: the run goes on.

    Returns:
        The config, and the tags of the run.

    Raises:
        InputError: the model cannot be had or does not fit.
    """
    if (folder / "config.json").is_file():
        logger.info("%s is there already: this run goes on", folder.parent)
        return config, {}
    source = find_model("--init", config.init)
    loaded = _load_init(source, config.task)
    sizes, text = sizes_for(config, loaded), text_for(config, loaded)
    weights = None if config.from_scratch else _pretrained(source, loaded)
    partial = folder.with_name(folder.name + ".tmp")
    common = {
        "model_config": sizes,
        "text_config": text,
        "recipe": config.recipe,
        "tokenizer": loaded.tokenizer,
    }
    torch.manual_seed(config.seed)
    if config.task in ON_PAIRS:
        student, teacher, report = start_pairs(sizes, weights, source=config.init)
        save_model(partial, student, **common)
    else:
        student, teacher, report = start_task(
            config.task, sizes, weights, recipe=config.recipe, source=config.init
        )
        answers = frequent_answers(collected, config.num_answers) if collected else ()
        save_task(partial, student, task=config.task, answers=answers, **common)
    logger.info("weights from %s", report)
    if teacher is not None:
        state = official_state(teacher, text_layers=sizes.text_layers, prefix=TEACHER)
        save_file(state, partial / TEACHER_FILE)
    if collected is not None:
        write_examples(collected, partial / EXAMPLES_FILE)
    partial.rename(folder)
    return config, {"weights": str(report), "init": config.init}


def start_pairs(
    config: ModelConfig, pretrained: Mapping[str, Tensor] | None, *, source: str
) -> tuple[ALBEF, Teacher, WeightsReport]:
    """Build student and teacher of retrieval and grounding from a pre-trained ALBEF, or at random.

    Both without the MLM head, which these tasks do not train. The teacher starts from the
    pre-trained teacher where the weights hold one.

    Raises:
        InputError: the weights do not fit.
    """
    student = ALBEF(config)
    student.drop_mlm_head()
    if pretrained is None:
        return student, Teacher(config, student), random_start(student)
    own = {name: w for name, w in pretrained.items() if not name.startswith(("teacher.", "queues"))}
    report = apply_weights(student, own, source=source, may_add=("mlm_head.",))
    teacher = Teacher(config, student)
    theirs = {
        name.removeprefix("teacher."): weight
        for name, weight in pretrained.items()
        if name.startswith("teacher.")
    }
    if theirs:
        apply_weights(teacher, theirs, source=source, may_add=("mlm_head.",))
    return student, teacher, report


def sizes_for(config: FinetuneConfig, loaded: LoadedModel | LoadedTask) -> ModelConfig:
    """Give the sizes of the task's model: those of the pre-trained one, at the new resolution.

    Raises:
        InputError: patches do not fill the pictures.
    """
    sizes = loaded.model_config
    ratio = 1 if config.task == "text-assignment" else SIZE_RATIO
    image_size = config.image_size or round(ratio * sizes.image_size)
    dropout = sizes.dropout if config.dropout is None else config.dropout
    return dataclasses.replace(sizes, image_size=image_size, dropout=dropout)


def text_for(config: FinetuneConfig, loaded: LoadedModel | LoadedTask) -> TextConfig:
    """Give the texts' bounds of the task; the tokenizer is that of the pre-trained model.

    Raises:
        InputError: the model has too few positions.
    """
    if config.max_tokens > loaded.model_config.max_positions:
        raise InputError(
            f"--max-tokens {config.max_tokens} is more than the"
            f" {loaded.model_config.max_positions} positions of --init {config.init}. Lower it."
        )
    return dataclasses.replace(
        loaded.text_config, max_words=config.max_words, max_tokens=config.max_tokens
    )


def frequent_answers(collected: Collected, count: int) -> tuple[str, ...]:
    """List the answers most often given, the most frequent first; equals by the alphabet."""
    times: Counter[str] = Counter()
    for given in collected.table["answers"].to_pylist():
        times.update(given)
    return tuple(sorted(times, key=lambda answer: (-times[answer], answer))[:count])


def _load_init(source: Path, task: TaskName) -> LoadedModel | LoadedTask:
    """Load what a task may start from: NLVR2 also takes a model of text assignment."""
    if task == "nlvr2" and task_of_model(source) == "text-assignment":
        return load_task(source)
    return load_model(source)


def _pretrained(source: Path, loaded: LoadedModel | LoadedTask) -> Mapping[str, Tensor]:
    """Read the weights of a pre-trained model, and of its teacher where a file has them."""
    if source.is_file():
        return read_official(source)
    weights = dict(loaded.model.state_dict())
    teacher = source / TEACHER_FILE
    if not teacher.is_file():
        return weights
    moving, _ = read_moving(teacher)
    return weights | {f"{TEACHER}{name}": weight for name, weight in moving.items()}
