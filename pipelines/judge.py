"""Models in processes of their own: they are shown pictures and texts, then judge pairs of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float32, Int64, UInt8
from ray.exceptions import RayTaskError

from albef_core.batch import normalize
from albef_core.config import ModelConfig, TextConfig
from albef_core.errors import InputError
from albef_core.tasks.retrieval import EncodedImages, encode_texts, itm_logits
from albef_core.weights import load_model

POLL_S = 0.5
CPUS_PER_JUDGE = 0.5
"""Ray's count for a judge without a GPU. Less than one, so that half of Ray's CPUs are left to the
tasks that decode, however many judges there are."""


class Judge:
    """Holds a model and all it has encoded; made to be a Ray actor with a GPU or without.

    Loading is a method and not the constructor, so that a bad model is an error that the driver can
    read.
    """

    def __init__(self, *, device: str, batch_size: int, num_judges: int) -> None:
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._num_seen = self._num_expected = 0
        self._pairs_done = 0
        if device == "cpu":
            # Ray gives an actor the threads of the CPUs it holds; judges have all of them to share.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_judges))

    def load(self, folder: str) -> tuple[ModelConfig, TextConfig]:
        """Load the model; return what decoding and cleaning must know of it."""
        self._loaded = load_model(folder, device=self._device)
        self._model = self._loaded.model.eval()
        return self._loaded.model_config, self._loaded.text_config

    def expect(self, num_pictures: int) -> None:
        """Make room for so many pictures; fewer may come."""
        self._num_expected = num_pictures

    @torch.inference_mode()
    def show(self, pictures: UInt8[np.ndarray, "N S S 3"]) -> Float32[np.ndarray, "N D"]:
        """Encode pictures behind those already seen; give their unit vectors."""
        first = self._num_seen
        for batch in torch.from_numpy(pictures.copy()).split(self._batch_size):
            parts = self._model.encode_image(normalize(batch.to(self._device)))
            if not self._num_seen:
                # All at once: lists joined at the end would take the memory twice.
                self._tokens, self._features = (
                    part.new_empty((self._num_expected, *part.shape[1:])) for part in parts
                )
            rows = slice(self._num_seen, self._num_seen + len(batch))
            self._tokens[rows], self._features[rows] = parts
            self._num_seen = rows.stop
        return self._features[first : self._num_seen].cpu().numpy()

    def read(self, texts: list[str]) -> Float32[np.ndarray, "T D"]:
        """Encode all texts, already cleaned; give their unit vectors."""
        ids = self._loaded.tokenizer.encode(
            texts,
            max_tokens=self._loaded.text_config.max_tokens,
            keep_sep=self._loaded.recipe.keep_sep,
        )
        token_ids = torch.from_numpy(ids).to(self._device)
        mask = token_ids != self._loaded.tokenizer.pad_id
        self._texts = encode_texts(self._model, token_ids, mask, batch_size=self._batch_size)
        return self._texts.features.cpu().numpy()

    def judge(self, pairs: Int64[np.ndarray, "P 2"]) -> Float32[np.ndarray, "P 2"]:
        """Give the ITM logits of pairs of a picture, in the order it was shown, and a text."""
        seen = slice(self._num_seen)
        logits = itm_logits(
            self._model,
            EncodedImages(tokens=self._tokens[seen], features=self._features[seen]),
            self._texts,
            torch.from_numpy(pairs.copy()).to(self._device),
            batch_size=self._batch_size,
            on_pairs=self._count,
        )
        return logits.cpu().numpy()

    def progress(self) -> int:
        """Count the pairs that ITM has judged, while `judge` runs in a thread."""
        return self._pairs_done

    def _count(self, num_done: int, num_wanted: int) -> None:
        self._pairs_done = num_done


class Judges:
    """Several judges as one: each holds every n-th picture, and all texts.

    Each encodes all texts for itself: that is some 5 texts an image, where ITM fuses hundreds of
    pairs an image, and their tokens, 0.1 MB a text, would be more to send than to make.
    """

    def __init__(self, num: int, *, device: str, batch_size: int) -> None:
        on_gpu = device == "cuda"
        actor: Any = ray.remote(Judge).options(
            num_cpus=0 if on_gpu else CPUS_PER_JUDGE, num_gpus=int(on_gpu), max_concurrency=2
        )
        self._actors = [
            actor.remote(device=device, batch_size=batch_size, num_judges=num) for _ in range(num)
        ]
        self._features: list[list[Any]] = [[] for _ in self._actors]
        self._waiting: list[Any] = []
        self._num_seen = 0

    def load(self, folder: Path) -> tuple[ModelConfig, TextConfig]:
        """Load the model everywhere; return what decoding and cleaning must know of it.

        Raises:
            InputError: it is damaged or of another task.
        """
        return self._ask([actor.load.remote(str(folder)) for actor in self._actors])[0]

    def expect(self, num_pictures: int) -> None:
        """Make room for so many pictures; fewer may come."""
        share = -(-num_pictures // len(self._actors))
        self._ask([actor.expect.remote(share) for actor in self._actors])

    def show(self, pictures: UInt8[np.ndarray, "N S S 3"]) -> None:
        """Deal out pictures; returns when those of the call before are encoded."""
        # The tasks that decode hold back while one block waits for the models.
        self._ask(self._waiting)
        self._waiting = []
        for number, actor in enumerate(self._actors):
            share = pictures[(number - self._num_seen) % len(self._actors) :: len(self._actors)]
            if len(share):
                self._waiting.append(actor.show.remote(share))
                self._features[number].append(self._waiting[-1])
        self._num_seen += len(pictures)

    def image_features(self) -> Float32[np.ndarray, "I D"]:
        """Give the unit vectors of all pictures, in the order they were shown; there is one."""
        parts = [
            (number, np.concatenate(self._ask(references)))
            for number, references in enumerate(self._features)
            if references
        ]
        features = np.empty((self._num_seen, parts[0][1].shape[1]), dtype=np.float32)
        for number, part in parts:
            features[number :: len(self._actors)] = part
        return features

    def read(self, texts: Sequence[str]) -> Float32[np.ndarray, "T D"]:
        """Encode all texts, already cleaned; give their unit vectors."""
        shared = ray.put(list(texts))
        return self._ask([actor.read.remote(shared) for actor in self._actors])[0]

    def judge(
        self, pairs: Int64[np.ndarray, "P 2"], *, on_pairs: Callable[[int, int], None]
    ) -> Float32[np.ndarray, "P 2"]:
        """Give the ITM logits of pairs of a picture and a text.

        `on_pairs` hears how many are done and wanted.
        """
        logits = np.empty((len(pairs), 2), dtype=np.float32)
        judged_by = pairs[:, 0] % len(self._actors)
        rows_of: dict[Any, Any] = {}
        for number, actor in enumerate(self._actors):
            rows = np.flatnonzero(judged_by == number)
            if len(rows):
                own = np.stack([pairs[rows, 0] // len(self._actors), pairs[rows, 1]], axis=1)
                rows_of[actor.judge.remote(own)] = rows
        waiting = list(rows_of)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_S)
            for reference in done:
                (logits[rows_of[reference]],) = self._ask([reference])
            num_done = sum(self._ask([actor.progress.remote() for actor in self._actors]))
            on_pairs(num_done, len(pairs))
        return logits

    def end(self) -> None:
        """End the processes."""
        for actor in self._actors:
            ray.kill(actor)

    def _ask(self, references: list[Any]) -> list[Any]:
        """Fetch remote results; the user's mistake arrives as it was raised there."""
        try:
            return ray.get(references)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
