"""Pre-training as the trainer sees it: ITC, ITM and MLM on pairs."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from albef_core.distributed import StepModel, data_parallel, own_share
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model, save_model
from pipelines.config import PretrainConfig
from pipelines.examples import VAL_FILE, open_examples
from pipelines.inputs import feed_spec, num_tokens, to_device
from pipelines.pairs import FeedBatch
from pipelines.train_pictures import hard_negative_similarity, log_pictures
from pipelines.validation import Validation, measured, retrieve_pairs

if TYPE_CHECKING:
    from pipelines.tracking import Tracker


class PretrainingTask:
    """Student, teacher and queues of a pre-training, from the model folder that it starts from."""

    shown = ("train/loss/itc", "train/loss/itm", "train/loss/mlm", "train/pairs_per_s")

    def __init__(self, config: PretrainConfig, start: Path, device: torch.device) -> None:
        self._config, self._device, self._val = config, device, start / VAL_FILE
        self._loaded = loaded = load_model(start, device=device)
        self.tokenizer, self.student = loaded.tokenizer, loaded.model
        self.text_layers = config.model.text_layers
        self.teacher = Teacher(config.model, self.student).train(not config.recipe.quiet_teacher)
        queues = Queues(config.model, config.objective, config.recipe, seed=config.seed)
        self.queues = queues.to(device)
        self.spec = feed_spec(config, start)
        self._model = data_parallel(StepModel(self.student, pretraining_step))

    def longest(self, batch: FeedBatch) -> int:
        """Count the tokens of the longest caption."""
        return num_tokens(batch, pad_id=self.tokenizer.pad_id)

    def forward(
        self, batch: FeedBatch, *, longest: int, alpha: float, seed: int
    ) -> PretrainingStep:
        """Take one step's losses, in the published order."""
        config = self._config
        self.student.clamp_temperature()
        self.teacher.follow(self.student, momentum=config.objective.teacher_momentum)
        pairs = to_device(
            batch,
            self._device,
            pad_id=self.tokenizer.pad_id,
            longest=longest,
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

    def accept(self, outcome: PretrainingStep) -> None:
        """Push the teacher's features of the global batch into the queues."""
        push_step(self.queues, outcome, num_pairs=self._config.batch_size)

    def curves(self, outcome: PretrainingStep) -> dict[str, Tensor]:
        """Give the three losses, and how hard the negatives are."""
        temperature = self.student.temperature
        right = (outcome.itm.logits.argmax(dim=1) == outcome.itm.labels)[outcome.itm.counts]
        return {
            "train/loss/total": outcome.loss,
            "train/loss/itc": outcome.itc.loss,
            "train/loss/itm": outcome.itm.loss,
            "train/loss/mlm": outcome.mlm.losses.total,
            "train/itm_accuracy": right.float().mean(),
            "train/hard_negative_similarity": hard_negative_similarity(outcome, temperature),
            "train/temperature": temperature,
            "train/queue_fill": self.queues.image.fill_share(),
        }

    def validate(self, corpus: Path) -> Validation:
        """Measure the recalls on the held-out pairs, by ITC."""
        loaded = measured(self._config, self._loaded, self.student, self.teacher)
        return retrieve_pairs(loaded, corpus, open_examples(self._val))

    def draw(
        self, tracker: "Tracker | None", batch: FeedBatch, outcome: PretrainingStep, *, step: int
    ) -> None:
        """Log pictures of hard negatives and of the teacher's pseudo-targets (a collective)."""
        own = own_share(self._config.batch_size)
        places = own if self._config.recipe.global_keys else range(len(own))
        log_pictures(tracker, batch, outcome, self.tokenizer, places=places, step=step)

    def save(self, folder: Path, student: ALBEF) -> None:
        """Write the model folder of a student."""
        save_student(folder, student, config=self._config, tokenizer=self.tokenizer)


def save_student(
    folder: Path, student: ALBEF, *, config: PretrainConfig, tokenizer: Tokenizer
) -> None:
    """Write the model folder of a pre-training's student."""
    save_model(
        folder,
        student,
        model_config=config.model,
        text_config=config.text,
        recipe=config.recipe,
        tokenizer=tokenizer,
    )
