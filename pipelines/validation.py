"""How good a model in training is on held-out pictures: every worker looks at its share of them.

Pictures that do not decode are left out here; evaluation counts them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from albef_core.api import Albef
from albef_core.distributed import gather_objects, own_share
from albef_core.errors import InputError
from albef_core.metrics import retrieval_metrics
from albef_core.tasks.folder import LoadedTask
from albef_core.tasks.predict import predict
from albef_core.weights import LoadedModel
from pipelines.pictures import picture_at
from pipelines.predictor import show_examples
from pipelines.scoring import score_answers

BATCH_SIZE = 64
ERROR = "val/error"
"""The curve that is lowest where the model is best."""
SHOWN = ("mean_recall", "tr_r1", "ir_r1")
"""Of retrieval's metrics, those that have a curve."""


def answer_examples(loaded: LoadedTask, corpus: Path, examples: pa.Table) -> dict[str, float]:
    """Give the accuracy on examples (`examples.SCHEMA`); a collective.

    The model is left in training mode, as it is found.

    Raises:
        InputError: no picture decodes.
    """
    loaded.model.eval()
    scores: list[NDArray[np.floating]] = [np.empty(0)]
    for rows in _parts(own_share(len(examples))):
        table = examples.slice(rows.start, len(rows))
        images, is_shown = show_examples(
            table.to_pylist(),
            corpus=corpus,
            image_size=loaded.model_config.image_size,
            has_two_pictures=loaded.task == "nlvr2",
        )
        said = predict(loaded, torch.from_numpy(images), table["text"].to_pylist())
        scores.append(score_answers(loaded.task, table, said.answers)[is_shown])
    loaded.model.train()
    every = np.concatenate(gather_objects(np.concatenate(scores)))
    _check_some(corpus, len(every))
    accuracy = float(every.mean())
    return {"val/accuracy": accuracy, ERROR: 1 - accuracy}


def retrieve_pairs(loaded: LoadedModel, corpus: Path, examples: pa.Table) -> dict[str, float]:
    """Give the recalls of retrieval by ITC alone; a collective.

    A text of `examples` (`examples.SCHEMA`) belongs to the picture of its row. The model is left in
    training mode, as it is found.

    Raises:
        InputError: no picture decodes.
    """
    texts_of: dict[int, list[str]] = {}
    for row, text in zip(examples["row"].to_pylist(), examples["text"].to_pylist(), strict=True):
        texts_of.setdefault(row, []).append(text)
    rows = list(texts_of)
    albef = Albef(loaded, batch_size=BATCH_SIZE)
    size = loaded.model_config.feature_size
    images, texts = [np.empty((0, size), np.float32)], [np.empty((0, size), np.float32)]
    counts: list[int] = []
    for part in _parts(own_share(len(rows))):
        pictures = {n: picture_at(corpus, rows[n], loaded.model_config.image_size) for n in part}
        shown = {n: picture for n, picture in pictures.items() if picture is not None}
        images.append(albef.embed_images(list(shown.values())))
        texts.append(albef.embed_texts([text for n in shown for text in texts_of[rows[n]]]))
        counts += [len(texts_of[rows[n]]) for n in shown]
    loaded.model.train()
    found = gather_objects((np.concatenate(images), np.concatenate(texts), counts))
    image_features, text_features, every_count = (
        np.concatenate(part) for part in zip(*found, strict=True)
    )
    _check_some(corpus, len(image_features))
    similarity = image_features @ text_features.T
    owners = np.repeat(np.arange(len(image_features)), every_count.astype(int))
    metrics = retrieval_metrics(similarity, similarity, owners, num_resamples=1, seed=0)
    curves = {f"val/{name}": metrics[name].value for name in SHOWN}
    return curves | {ERROR: 1 - metrics["mean_recall"].value}


def _check_some(corpus: Path, count: int) -> None:
    if not count:
        raise InputError(f"--val {corpus}: no picture decodes. Give another corpus, or none.")


def _parts(own: range) -> Iterator[range]:
    return (own[start : start + BATCH_SIZE] for start in range(0, len(own), BATCH_SIZE))
