"""Text assignment as the trainer sees it: captions of which one of two pictures is the own."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from albef_core.distributed import StepModel, data_parallel
from albef_core.tasks.folder import load_task, save_task
from albef_core.tasks.text_assignment import AssignmentStep, assignment_step
from pipelines.config import FinetuneConfig
from pipelines.inputs import num_tokens, to_device
from pipelines.pairs import FeedBatch, FeedSpec

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from pipelines.validation import Validation


class AssignmentTask:
    """The student alone, from the folder that the driver has prepared; nothing is distilled.

    Its feed is pre-training's: a picture an item, with one of its captions.
    """

    teacher, queues = None, None
    shown = ("train/loss/total", "train/accuracy", "train/pairs_per_s")

    def __init__(self, config: FinetuneConfig, start: Path, device: torch.device) -> None:
        self._config, self._device = config, device
        self._loaded = loaded = load_task(start, device=device)
        self.student = loaded.model
        self.text_layers = loaded.model_config.text_layers
        self.spec = FeedSpec(
            corpus=config.corpus,
            tokenizer=str(start),
            text=loaded.text_config,
            augment=config.augment,
            image_size=loaded.model_config.image_size,
            mask_share=0.0,
            keep_sep=config.recipe.keep_sep,
            words_only=config.recipe.words_only,
            saturate_pixels=config.recipe.saturate_pixels,
            seed=config.seed,
            batch_size=config.batch_size,
        )
        self._model = data_parallel(StepModel(self.student, assignment_step))

    def longest(self, batch: FeedBatch) -> int:
        """Count the tokens of the longest caption."""
        return num_tokens(batch, pad_id=self._loaded.tokenizer.pad_id)

    def forward(self, batch: FeedBatch, *, longest: int, alpha: float, seed: int) -> AssignmentStep:
        """Take one step's loss; `alpha` weighs a teacher, which is not there."""
        config = self._config
        pairs = to_device(
            batch,
            self._device,
            pad_id=self._loaded.tokenizer.pad_id,
            longest=longest,
            num_global=config.batch_size,
        )
        return self._model(
            pairs, recipe=config.recipe, seed=seed, micro_batch_size=config.micro_batch_size
        )

    def accept(self, outcome: AssignmentStep) -> None:
        """There are no queues to fill."""

    def curves(self, outcome: AssignmentStep) -> dict[str, Tensor]:
        """Give the loss, and how often the right class is the most likely."""
        right = (outcome.logits.argmax(dim=1) == outcome.labels)[outcome.counts]
        return {"train/loss/total": outcome.loss, "train/accuracy": right.float().mean()}

    def validate(self, corpus: Path) -> "Validation":
        """Never asked: `finetune` refuses --val, the NLVR2 that follows says what it is worth."""
        raise AssertionError(corpus)

    def draw(
        self, tracker: "Tracker | None", batch: FeedBatch, outcome: AssignmentStep, *, step: int
    ) -> None:
        """Log no picture: NLVR2's evaluation shows what it is worth."""

    def save(self, folder: Path, student: nn.Module) -> None:
        """Write the model folder of a student."""
        save_task(
            folder,
            student,
            task="text-assignment",
            model_config=self._loaded.model_config,
            text_config=self._loaded.text_config,
            recipe=self._config.recipe,
            tokenizer=self._loaded.tokenizer,
        )
