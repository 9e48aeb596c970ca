"""The model as MLflow serves it: pictures and texts in; how well they fit, or answers, out.

MLflow copies this file beside the weights and runs it when the model is loaded (models from code),
so nothing is pickled; it imports albef_core, of which a copy travels along, and nothing else of
ours.
"""

import base64
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.preprocess import decode_image, resize_square
from albef_core.tasks.folder import LoadedTask, load_task
from albef_core.tasks.predict import predict
from albef_core.tasks.retrieval import EncodedImages, encode_texts, itm_logits
from albef_core.weights import LoadedModel, load_model, task_of_model

BATCH_SIZE = 32


class ServedModel(PythonModel):
    """Judges pairs of a picture and a text, or does the task that it was fine-tuned for."""

    loaded: LoadedModel
    """A pre-trained model, or one for retrieval."""
    tuned: LoadedTask | None = None
    """... or a task's."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that were logged."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = Path(context.artifacts["model"])
        if task_of_model(folder):
            self.tuned = load_task(folder, device=self.device)
            self.tuned.model.eval()
        else:
            self.loaded = load_model(folder, device=self.device)
            self.loaded.model.eval()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # None is MLflow's stub
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict | None = None
    ) -> pd.DataFrame:
        """Judge each row's `image` (encoded bytes, or base64 of them) against its `text`.

        `similarity` is the cosine of ITC, -1 to 1; `match` the probability by ITM, 0 to 1. A model
        fine-tuned for a task gives `answer`, the class or the answer to the question, and its
        `probability`; where two pictures are judged, `left` stands beside `image`, the right one.
        """
        work = self._judge if self.tuned is None else partial(self._do_task, self.tuned)
        parts = [
            work(model_input.iloc[start : start + BATCH_SIZE])
            for start in range(0, len(model_input), BATCH_SIZE)
        ]
        return pd.concat(parts, ignore_index=True)

    def _do_task(self, tuned: LoadedTask, rows: pd.DataFrame) -> pd.DataFrame:
        size, sides = tuned.model_config.image_size, ("left", "image")
        pictures = [_pixels(rows[name], size) for name in sides if name in rows]
        pixels = torch.stack(pictures, dim=1) if len(pictures) > 1 else pictures[0]
        said = predict(tuned, pixels, list(rows["text"]))
        best = said.probabilities.max(axis=1).astype(float)
        return pd.DataFrame({"answer": said.answers, "probability": best})

    @torch.inference_mode()
    def _judge(self, pairs: pd.DataFrame) -> pd.DataFrame:
        model, text = self.loaded.model, self.loaded.text_config
        pixels = _pixels(pairs["image"], self.loaded.model_config.image_size)
        tokens, features = model.encode_image(normalize(pixels.to(self.device)))
        images = EncodedImages(tokens=tokens, features=features)
        ids = self.loaded.tokenizer.encode(
            [clean_caption(raw, max_words=text.max_words) for raw in pairs["text"]],
            max_tokens=text.max_tokens,
            keep_sep=self.loaded.recipe.keep_sep,
        )
        token_ids = torch.from_numpy(ids).to(self.device)
        mask = token_ids != self.loaded.tokenizer.pad_id
        texts = encode_texts(model, token_ids, mask, batch_size=BATCH_SIZE)
        own = torch.arange(len(pairs), device=self.device)
        logits = itm_logits(
            model, images, texts, torch.stack([own, own], dim=1), batch_size=BATCH_SIZE
        )
        return pd.DataFrame(
            {
                "similarity": (images.features * texts.features).sum(dim=1).double().cpu().numpy(),
                "match": logits.softmax(dim=1)[:, 1].double().cpu().numpy(),
            }
        )


def _pixels(images: Iterable[bytes | str], size: int) -> torch.Tensor:
    pictures = [resize_square(decode_image(_as_bytes(image)), size) for image in images]
    return torch.from_numpy(np.stack(pictures))


def _as_bytes(image: bytes | str) -> bytes:
    return base64.b64decode(image) if isinstance(image, str) else bytes(image)


set_model(ServedModel())
