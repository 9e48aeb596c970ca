"""Fine-tuning from examples as the trainer sees it: entailment, VQA and NLVR2."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from albef_core.batch import normalize
from albef_core.distributed import StepModel, data_parallel
from albef_core.tasks.entailment import EntailmentBatch, entailment_step
from albef_core.tasks.folder import LoadedTask, load_task, save_task
from albef_core.tasks.labels import LABELS
from albef_core.tasks.nlvr2 import Nlvr2Batch, nlvr2_step
from albef_core.tasks.predict import MAX_ANSWER_TOKENS
from albef_core.tasks.vqa import VqaBatch, vqa_step
from albef_core.teacher import follow, frozen_copy
from albef_core.weights import apply_weights
from pipelines.checkpoint import TEACHER_FILE, read_moving
from pipelines.config import FinetuneConfig
from pipelines.examples import EXAMPLES_FILE, VAL_FILE, ExampleBatch, ExampleSpec, open_examples
from pipelines.validation import Validation, answer_examples, measured

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

STEPS: dict[str, Callable[..., Any]] = {
    "entailment": entailment_step,
    "vqa": vqa_step,
    "nlvr2": nlvr2_step,
}


class ExampleTask:
    """Student and teacher of a task, from the folder that the driver has prepared."""

    queues = None

    def __init__(self, config: FinetuneConfig, start: Path, device: torch.device) -> None:
        self._config, self._device, self._val = config, device, start / VAL_FILE
        self._loaded = load_task(start, device=device)
        self.tokenizer, self.student = self._loaded.tokenizer, self._loaded.model
        self.teacher = frozen_copy(self.student)
        read_teacher(start / TEACHER_FILE, self.teacher)
        self.teacher.train(not config.recipe.quiet_teacher)
        self.text_layers = self._loaded.model_config.text_layers
        self.spec = example_spec(config, start, self._loaded)
        step = STEPS[self._loaded.task]
        self._model = data_parallel(StepModel(self.student, step))
        accuracy = ("train/accuracy",) if self._loaded.task in LABELS else ()
        self.shown = ("train/loss/total", *accuracy, "train/pairs_per_s")

    def longest(self, batch: ExampleBatch) -> int:
        """Count the tokens of the longest text."""
        return int((batch.token_ids != self.tokenizer.pad_id).sum(axis=1).max())

    def forward(self, batch: ExampleBatch, *, longest: int, alpha: float, seed: int) -> Any:
        """Let the teacher follow, then take one step's loss, as published."""
        config = self._config
        follow(self.teacher, self.student, momentum=config.objective.teacher_momentum)
        return self._model(
            self.teacher,
            to_task_batch(
                batch,
                self._loaded,
                device=self._device,
                longest=longest,
                num_global=config.batch_size,
            ),
            alpha=alpha,
            seed=seed,
            micro_batch_size=config.micro_batch_size,
        )

    def accept(self, outcome: Any) -> None:
        """There are no queues to fill."""

    def curves(self, outcome: Any) -> dict[str, Tensor]:
        """Give the loss, and how often the right class, or the next token, is the most likely."""
        right = (outcome.logits.argmax(dim=1) == outcome.labels).float().mean()
        name = "accuracy" if self._loaded.task in LABELS else "token_accuracy"
        return {"train/loss/total": outcome.loss, f"train/{name}": right}

    def validate(self, corpus: Path) -> Validation:
        """Measure the accuracy on the held-out examples."""
        loaded = measured(self._config, self._loaded, self.student, self.teacher)
        return answer_examples(loaded, corpus, open_examples(self._val))

    def draw(
        self, tracker: "Tracker | None", batch: ExampleBatch, outcome: Any, *, step: int
    ) -> None:
        """Log no picture: evaluation shows the best and the worst cases."""

    def save(self, folder: Path, student: nn.Module) -> None:
        """Write the model folder of a student."""
        loaded = self._loaded
        save_task(
            folder,
            student,
            task=loaded.task,
            model_config=loaded.model_config,
            text_config=loaded.text_config,
            recipe=self._config.recipe,
            tokenizer=loaded.tokenizer,
            answers=loaded.answers,
        )


def example_spec(config: FinetuneConfig, start: Path, loaded: LoadedTask) -> ExampleSpec:
    """Describe the examples of a training whose start lies in a folder."""
    return ExampleSpec(
        corpus=config.corpus,
        examples=start / EXAMPLES_FILE,
        is_question=loaded.task == "vqa",
        has_two_pictures=loaded.task == "nlvr2",
        tokenizer=str(start),
        text=loaded.text_config,
        augment=config.augment,
        image_size=loaded.model_config.image_size,
        keep_sep=config.recipe.keep_sep,
        saturate_pixels=config.recipe.saturate_pixels,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def to_task_batch(
    batch: ExampleBatch,
    loaded: LoadedTask,
    *,
    device: torch.device,
    longest: int,
    num_global: int | None = None,
) -> EntailmentBatch | VqaBatch | Nlvr2Batch:
    """Copy a batch to the device and normalize it there; texts are cut to `longest` tokens."""
    ids = torch.tensor(batch.token_ids[:, :longest], device=device).long()
    mask = ids != loaded.tokenizer.pad_id
    images = torch.tensor(batch.images).to(device, non_blocking=True)
    if loaded.task == "nlvr2":
        pixels = normalize(images.flatten(0, 1)).unflatten(0, (-1, 2))
        return Nlvr2Batch(
            images=pixels,
            token_ids=ids,
            attention_mask=mask,
            labels=_labels(batch, "nlvr2", device),
            num_global=num_global,
        )
    if loaded.task == "entailment":
        return EntailmentBatch(
            images=normalize(images),
            token_ids=ids,
            attention_mask=mask,
            labels=_labels(batch, "entailment", device),
            num_global=num_global,
        )
    answers, weights, counts = weigh_answers(batch.answers, batch.weights.tolist())
    listed = loaded.tokenizer.encode(answers, max_tokens=MAX_ANSWER_TOKENS, keep_sep=True)
    answer_ids = torch.tensor(np.asarray(listed), device=device).long()
    return VqaBatch(
        images=normalize(images),
        question_ids=ids,
        question_mask=mask,
        answer_ids=answer_ids,
        answer_mask=answer_ids != loaded.tokenizer.pad_id,
        weights=torch.tensor(weights, device=device),
        num_answers=torch.tensor(counts, device=device),
        num_global=num_global,
    )


def _labels(batch: ExampleBatch, task: str, device: torch.device) -> Tensor:
    return torch.tensor([LABELS[task].index(label) for label in batch.labels], device=device)


def weigh_answers(
    answers: Sequence[Sequence[str]], weights: Sequence[float]
) -> tuple[list[str], list[float], list[int]]:
    """List each distinct answer of a question once, weighted by the share who gave it.

    The answers of a question weigh `weights` together. They come in the order of first appearance,
    as in the published data code.

    Returns:
        The answers of all questions, their weights, and how many each question has.
    """
    texts, shares, counts = [], [], []
    for given, weight in zip(answers, weights, strict=True):
        times = Counter(given)
        texts += times
        shares += [weight * count / len(given) for count in times.values()]
        counts.append(len(times))
    return texts, shares, counts


def read_teacher(file: Path, teacher: nn.Module) -> None:
    """Give a teacher the weights that the driver has prepared."""
    weights, _ = read_moving(file)
    apply_weights(teacher, weights, source=str(file))
