"""How good a model in training is on held-out pictures: every worker looks at its share of them.

Pictures that do not decode are left out here; evaluation counts them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from albef_core.api import Albef
from albef_core.distributed import gather_objects, own_share
from albef_core.errors import InputError
from albef_core.metrics import retrieval_metrics
from albef_core.paired import hit_shares
from albef_core.tasks.folder import LoadedTask
from albef_core.tasks.predict import predict
from albef_core.teacher import with_weights_of
from albef_core.weights import LoadedModel
from pipelines.config import TrainConfig
from pipelines.pictures import picture_at
from pipelines.predictor import show_examples
from pipelines.scoring import score_answers

BATCH_SIZE = 64
ERROR = "val/error"
"""The curve that is lowest where the model is best."""
SHOWN = ("mean_recall", "tr_r1", "ir_r1")
"""Of retrieval's metrics, those that have a curve."""

ROWS_FILE = "validation.npz"
"""In a run's folder: the rows of its last validation, by which two runs are compared."""
Loaded = TypeVar("Loaded", LoadedModel, LoadedTask)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What held-out pictures say of a model in training, on all workers the same."""

    curves: dict[str, float]
    scores: NDArray[np.floating]
    """Of each query or example, between 0 and 1."""
    pictures: NDArray[np.int64]
    """The picture that each of them is about, by its row of the corpus."""
    parts: NDArray[np.int64]
    """Retrieval's directions, 0 and 1: their means are averaged."""

    def write(self, run_dir: Path) -> None:
        """Keep the rows; by rename, so whole or not at all."""
        partial = run_dir / f"partial-{ROWS_FILE}"
        np.savez(partial, scores=self.scores, pictures=self.pictures, parts=self.parts)
        partial.replace(run_dir / ROWS_FILE)


def measured(
    config: TrainConfig, loaded: Loaded, student: nn.Module, teacher: nn.Module | None
) -> Loaded:
    """Choose what `--val-model` names; a teacher is measured in a student's place."""
    if config.val_model == "student" or teacher is None:
        return loaded
    return replace(loaded, model=with_weights_of(teacher, student))


def answer_examples(loaded: LoadedTask, corpus: Path, examples: pa.Table) -> Validation:
    """Measure the accuracy on examples (`examples.SCHEMA`); a collective.

    The model is left in the mode in which it is found.

    Raises:
        InputError: no picture decodes.
    """
    mode = loaded.model.training
    loaded.model.eval()
    scores: list[NDArray[np.floating]] = [np.empty(0)]
    pictures: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
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
        pictures.append(table["row"].to_numpy()[is_shown])
    loaded.model.train(mode)
    found = gather_objects((np.concatenate(scores), np.concatenate(pictures)))
    every, shown = (np.concatenate(part) for part in zip(*found, strict=True))
    _check_some(corpus, len(every))
    accuracy = float(every.mean())
    return Validation(
        curves={"val/accuracy": accuracy, ERROR: 1 - accuracy},
        scores=every,
        pictures=shown,
        parts=np.zeros(len(every), np.int64),
    )


def retrieve_pairs(loaded: LoadedModel, corpus: Path, examples: pa.Table) -> Validation:
    """Measure the recalls of retrieval by ITC alone; a collective.

    A text of `examples` (`examples.SCHEMA`) belongs to the picture of its row. The model is left in
    the mode in which it is found.

    Raises:
        InputError: no picture decodes.
    """
    texts_of: dict[int, list[str]] = {}
    for row, text in zip(examples["row"].to_pylist(), examples["text"].to_pylist(), strict=True):
        texts_of.setdefault(row, []).append(text)
    rows = list(texts_of)
    mode = loaded.model.training
    albef = Albef(loaded, batch_size=BATCH_SIZE)
    size = loaded.model_config.feature_size
    images, texts = [np.empty((0, size), np.float32)], [np.empty((0, size), np.float32)]
    counts: list[tuple[int, int]] = []
    for part in _parts(own_share(len(rows))):
        pictures = {n: picture_at(corpus, rows[n], loaded.model_config.image_size) for n in part}
        shown = {n: picture for n, picture in pictures.items() if picture is not None}
        images.append(albef.embed_images(list(shown.values())))
        texts.append(albef.embed_texts([text for n in shown for text in texts_of[rows[n]]]))
        counts += [(rows[n], len(texts_of[rows[n]])) for n in shown]
    loaded.model.train(mode)
    own_counts = np.array(counts, np.int64).reshape(-1, 2)
    found = gather_objects((np.concatenate(images), np.concatenate(texts), own_counts))
    image_features, text_features, every_count = (
        np.concatenate(part) for part in zip(*found, strict=True)
    )
    _check_some(corpus, len(image_features))
    similarity = image_features @ text_features.T
    shown_rows, num_texts = every_count.T
    owners = np.repeat(np.arange(len(image_features)), num_texts)
    metrics = retrieval_metrics(similarity, similarity, owners, num_resamples=1, seed=0)
    curves = {f"val/{name}": metrics[name].value for name in SHOWN}
    directions = hit_shares(similarity, similarity, owners)
    return Validation(
        curves=curves | {ERROR: 1 - metrics["mean_recall"].value},
        scores=np.concatenate(directions),
        pictures=np.concatenate([shown_rows, shown_rows[owners]]),
        parts=np.repeat([0, 1], [len(scores) for scores in directions]),
    )


def _check_some(corpus: Path, count: int) -> None:
    if not count:
        raise InputError(f"--val {corpus}: no picture decodes. Give another corpus, or none.")


def _parts(own: range) -> Iterator[range]:
    return (own[start : start + BATCH_SIZE] for start in range(0, len(own), BATCH_SIZE))
