"""A model in a process of its own: it is shown pictures and texts, then scores them."""

import os

import numpy as np
import torch
from numpy.typing import NDArray

from albef_core.batch import normalize
from albef_core.config import ModelConfig, TextConfig
from albef_core.tasks.retrieval import (
    EncodedImages,
    encode_texts,
    itc_similarity,
    rerank,
)
from albef_core.weights import load_model

Scores = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Image to text and text to image; a row is an image in both."""


class Judge:
    """Holds a model and all it has encoded; made to be a Ray actor with a GPU or without.

    Loading is a method and not the constructor, so that a bad model is an error that the driver can
    read.
    """

    def __init__(self, device: str, batch_size: int) -> None:
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._num_seen = self._num_expected = 0
        self._pairs_done = self._pairs_wanted = 0
        if device == "cpu":
            # Ray gives an actor the threads of the CPUs it holds, and this one works alone by then.
            torch.set_num_threads(len(os.sched_getaffinity(0)))

    def load(self, folder: str) -> tuple[ModelConfig, TextConfig]:
        """Load the model; return what decoding and cleaning must know of it."""
        self._loaded = load_model(folder, device=self._device)
        self._model = self._loaded.model.eval()
        return self._loaded.model_config, self._loaded.text_config

    def expect(self, num_pictures: int) -> None:
        """Make room for so many pictures; fewer may come."""
        self._num_expected = num_pictures

    @torch.inference_mode()
    def show(self, pictures: NDArray[np.uint8]) -> None:
        """Encode pictures (N, S, S, 3) behind those already seen."""
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

    def read(self, texts: list[str]) -> None:
        """Encode all texts, already cleaned."""
        ids = self._loaded.tokenizer.encode(
            texts,
            max_tokens=self._loaded.text_config.max_tokens,
            keep_sep=self._loaded.recipe.keep_sep,
        )
        token_ids = torch.from_numpy(ids).to(self._device)
        mask = token_ids != self._loaded.tokenizer.pad_id
        self._texts = encode_texts(self._model, token_ids, mask, batch_size=self._batch_size)

    def score(self, top_k: int) -> dict[str, Scores]:
        """Score all pairs by ITC alone, and the best `top_k` of every query by ITM."""
        seen = slice(self._num_seen)
        images = EncodedImages(tokens=self._tokens[seen], features=self._features[seen])
        similarity = itc_similarity(images, self._texts).cpu().numpy()
        judged = rerank(
            self._model,
            images,
            self._texts,
            top_k=top_k,
            batch_size=self._batch_size,
            on_pairs=self._count,
        )
        ways = judged.image_to_text.cpu().numpy(), judged.text_to_image.cpu().numpy()
        return {"itc": (similarity, similarity), "itm": ways}

    def progress(self) -> tuple[int, int]:
        """Count the pairs that ITM has judged, and all of them, while `score` runs in a thread."""
        return self._pairs_done, self._pairs_wanted

    def _count(self, num_done: int, num_wanted: int) -> None:
        self._pairs_done, self._pairs_wanted = num_done, num_wanted
