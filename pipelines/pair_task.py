"""Fine-tuning from pairs as the trainer sees it: retrieval, and grounding, which learns alike."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from albef_core.batch import RetrievalBatch, normalize
from albef_core.config import ObjectiveConfig
from albef_core.distributed import StepModel, data_parallel
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.outcome import RetrievalStep
from albef_core.pretraining import push_step
from albef_core.tasks.retrieval import retrieval_step
from albef_core.teacher import Teacher
from albef_core.weights import load_model, save_model
from pipelines.checkpoint import TEACHER_FILE
from pipelines.config import FinetuneConfig
from pipelines.example_task import read_teacher
from pipelines.examples import EXAMPLES_FILE, VAL_FILE, ExampleBatch, ExampleSpec, open_examples
from pipelines.validation import Validation, measured, retrieve_pairs

if TYPE_CHECKING:
    from pipelines.tracking import Tracker


class PairTask:
    """Student, teacher and queues, from the folder that the driver has prepared."""

    shown = ("train/loss/itc", "train/loss/itm", "train/pairs_per_s")

    def __init__(self, config: FinetuneConfig, start: Path, device: torch.device) -> None:
        self._config, self._device, self._val = config, device, start / VAL_FILE
        self._loaded = loaded = load_model(start, device=device)
        self.student = loaded.model
        self.teacher = Teacher(loaded.model_config, self.student)
        read_teacher(start / TEACHER_FILE, self.teacher)
        self.teacher.train(not config.recipe.quiet_teacher)
        slots = ObjectiveConfig(num_slots=config.num_slots)
        queues = Queues(loaded.model_config, slots, config.recipe, seed=config.seed)
        self.queues = queues.to(device)
        self.text_layers = loaded.model_config.text_layers
        self.spec = ExampleSpec(
            corpus=config.corpus,
            examples=start / EXAMPLES_FILE,
            is_question=False,
            has_two_pictures=False,
            tokenizer=str(start),
            text=loaded.text_config,
            augment=config.augment,
            image_size=loaded.model_config.image_size,
            keep_sep=config.recipe.keep_sep,
            saturate_pixels=config.recipe.saturate_pixels,
            seed=config.seed,
            batch_size=config.batch_size,
        )
        self._model = data_parallel(StepModel(self.student, retrieval_step))

    def longest(self, batch: ExampleBatch) -> int:
        """Count the tokens of the longest text."""
        return int((batch.token_ids != self._loaded.tokenizer.pad_id).sum(axis=1).max())

    def forward(
        self, batch: ExampleBatch, *, longest: int, alpha: float, seed: int
    ) -> RetrievalStep:
        """Let the teacher follow, then take one step's losses; the temperature is not clamped.

        As published: pre-training has brought it where it should be.
        """
        config = self._config
        self.teacher.follow(self.student, momentum=config.objective.teacher_momentum)
        ids = torch.tensor(batch.token_ids[:, :longest], device=self._device).long()
        images = torch.tensor(batch.images).to(self._device, non_blocking=True)
        pairs = RetrievalBatch(
            images=normalize(images),
            token_ids=ids,
            attention_mask=ids != self._loaded.tokenizer.pad_id,
            image_ids=torch.tensor(batch.image_keys, device=self._device),
            num_global=config.batch_size,
        )
        return self._model(
            self.teacher,
            self.queues,
            pairs,
            alpha=alpha,
            recipe=config.recipe,
            seed=seed,
            micro_batch_size=config.micro_batch_size,
        )

    def accept(self, outcome: RetrievalStep) -> None:
        """Push the teacher's features of the global batch into the queues."""
        push_step(self.queues, outcome, num_pairs=self._config.batch_size)

    def curves(self, outcome: RetrievalStep) -> dict[str, Tensor]:
        """Give the two losses, and how often matching is right."""
        right = (outcome.itm.logits.argmax(dim=1) == outcome.itm.labels)[outcome.itm.counts]
        return {
            "train/loss/total": outcome.loss,
            "train/loss/itc": outcome.itc.loss,
            "train/loss/itm": outcome.itm.loss,
            "train/itm_accuracy": right.float().mean(),
            "train/temperature": self.student.temperature,
        }

    def validate(self, corpus: Path) -> Validation:
        """Measure the recalls on the held-out pairs, by ITC."""
        loaded = measured(self._config, self._loaded, self.student, self.teacher)
        return retrieve_pairs(loaded, corpus, open_examples(self._val))

    def draw(
        self, tracker: "Tracker | None", batch: ExampleBatch, outcome: RetrievalStep, *, step: int
    ) -> None:
        """Log no picture: evaluation shows what is found."""

    def save(self, folder: Path, student: ALBEF) -> None:
        """Write the model folder of a student."""
        save_model(
            folder,
            student,
            model_config=self._loaded.model_config,
            text_config=self._loaded.text_config,
            recipe=self._config.recipe,
            tokenizer=self._loaded.tokenizer,
            tuned_for=self._config.task,
        )
