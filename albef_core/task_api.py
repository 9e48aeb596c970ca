"""A fine-tuned model for use from Python: answers, entailment, texts on two pictures.

    vqa = FineTuned.load("runs/vqa/model")
    vqa.answer(["dog.jpg"], ["what is the dog chasing?"]).answers

Axis beside the package's own: C classes, or candidates of a question.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from albef_core.api import Picture, check_list, read_picture
from albef_core.errors import InputError
from albef_core.preprocess import resize_square
from albef_core.tasks.folder import LoadedTask, TaskName, load_task
from albef_core.tasks.predict import Answering, Predictions, predict
from albef_core.tasks.vqa_answers import check_answers


class FineTuned:
    """A model fine-tuned for entailment, VQA, NLVR2 or text assignment. Make one with `load`.

    At most `batch_size` examples are computed at a time. Every method raises InputError for a
    picture that cannot be read, for lists of different lengths, and for a model of another task.
    """

    def __init__(self, loaded: LoadedTask, *, batch_size: int = 32) -> None:
        self.loaded, self.batch_size = loaded, batch_size
        loaded.model.eval()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        answers: Sequence[str] = (),
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> "FineTuned":
        """Load a fine-tuned run's model folder, or an official checkpoint of a task.

        `answers` is the closed list of a VQA model in place of its own; an official file has none.

        Raises:
            InputError: nothing is there, it is no such model, or an answer comes twice.
        """
        loaded = load_task(Path(source), device=device)
        if answers:
            check_answers(answers, source="answers")
            loaded = replace(loaded, answers=tuple(answers))
        return cls(loaded, batch_size=batch_size)

    def answer(
        self,
        images: Sequence[Picture],
        questions: Sequence[str],
        *,
        answering: Answering | None = None,
    ) -> Predictions:
        """Answer a question about each image, from the model's list or in its own words (VQA)."""
        answering = answering or Answering()
        if self.loaded.task == "vqa" and not (self.loaded.answers or answering.is_open):
            raise InputError(
                "this model came without a list of answers, as official files do. Load it with"
                " answers=[...], or ask with Answering(is_open=True)."
            )
        return self._predict("vqa", [images], questions, answering)

    def entail(self, images: Sequence[Picture], texts: Sequence[str]) -> Float32[np.ndarray, "B 3"]:
        """Give the probabilities of `tasks.labels.ENTAILMENT_LABELS`: does the text follow?"""
        return self._predict("entailment", [images], texts).probabilities

    def verify(
        self, lefts: Sequence[Picture], rights: Sequence[Picture], texts: Sequence[str]
    ) -> Float32[np.ndarray, " B"]:
        """Give the probability that each text is true of its two images (NLVR2)."""
        return self._predict("nlvr2", [lefts, rights], texts).probabilities[:, 1]

    def assign(
        self, lefts: Sequence[Picture], rights: Sequence[Picture], texts: Sequence[str]
    ) -> Float32[np.ndarray, "B 3"]:
        """Give the probabilities of `tasks.text_assignment.LABELS`: which image has each text?"""
        return self._predict("text-assignment", [lefts, rights], texts).probabilities

    def _predict(
        self,
        task: TaskName,
        sides: list[Sequence[Picture]],
        texts: Sequence[str],
        answering: Answering | None = None,
    ) -> Predictions:
        if self.loaded.task != task:
            raise InputError(f"this model is fine-tuned for {self.loaded.task}, not for {task}.")
        lengths = [len(check_list(items)) for items in (*sides, texts)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise InputError(f"lists of {lengths} items do not fit together. Give as many of each.")
        parts = []
        for start in range(0, len(texts), self.batch_size):
            stop = start + self.batch_size
            pixels = [self._pixels(images[start:stop]) for images in sides]
            stacked = torch.stack(pixels, dim=1) if len(pixels) > 1 else pixels[0]
            parts.append(predict(self.loaded, stacked, texts[start:stop], answering=answering))
        return Predictions(
            answers=[answer for part in parts for answer in part.answers],
            probabilities=np.concatenate([part.probabilities for part in parts]),
            candidates=[row for part in parts for row in part.candidates],
        )

    def _pixels(self, images: Sequence[Picture]) -> UInt8[Tensor, "B S S 3"]:
        size = self.loaded.model_config.image_size
        return torch.from_numpy(np.stack([resize_square(read_picture(i), size) for i in images]))
