"""A fine-tuned model before the examples of a corpus: Ray tasks show them, actors answer."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray

from albef_core.tasks.folder import load_task
from albef_core.tasks.predict import Answering, predict
from pipelines.pictures import DECODE_CPUS, Block, hold_order, picture_at


def predicted_blocks(
    examples: pa.Table,
    *,
    corpus: Path,
    model: Path,
    image_size: int,
    has_two_pictures: bool,
    batch_size: int,
    actors: int,
    on_gpu: bool,
    answering: Answering,
    answers: tuple[str, ...],
) -> Iterator[Block]:
    """Predict every example (`examples.SCHEMA`) in its order; nothing is dropped.

    A block has `number`, `answer`, `probability` of it, and `is_shown`: False where a picture does
    not decode.
    """
    asked = examples.select(["row", "left", "text"])
    items = [
        {"start": start, "examples": json.dumps(asked.slice(start, batch_size).to_pylist())}
        for start in range(0, len(asked), batch_size)
    ]
    show: Any = _show  # Ray's own type of it lists every format of a batch
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        show,
        batch_size=None,
        num_cpus=DECODE_CPUS,
        fn_kwargs={
            "corpus": corpus,
            "image_size": image_size,
            "has_two_pictures": has_two_pictures,
        },
    )
    dataset = dataset.map_batches(
        _Predictor,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0 if on_gpu else 1,
        num_gpus=1 if on_gpu else 0,
        fn_constructor_kwargs={
            "model": model,
            "on_gpu": on_gpu,
            "answering": answering,
            "answers": answers,
        },
    )
    pictures = 2 if has_two_pictures else 1
    hold_order(dataset, block_bytes=batch_size * pictures * 3 * image_size**2)
    blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy")
    return iter(blocks)


def _show(item: Block, *, corpus: Path, image_size: int, has_two_pictures: bool) -> Block:
    examples, start = json.loads(str(item["examples"][0])), int(item["start"][0])
    images, is_shown = show_examples(
        examples, corpus=corpus, image_size=image_size, has_two_pictures=has_two_pictures
    )
    return {
        "number": np.arange(start, start + len(examples)),
        "images": images,
        "texts": np.array([example["text"] for example in examples], dtype=object),
        "is_shown": is_shown,
    }


def show_examples(
    examples: Sequence[Mapping[str, Any]],
    *,
    corpus: Path,
    image_size: int,
    has_two_pictures: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decode the pictures of examples, which have the columns of `examples.SCHEMA`.

    Returns:
        Pictures (N, S, S, 3), or pairs of them, left and right (N, 2, S, S, 3), black where one
        does not decode; and whether all of an example's decode (N).
    """
    sides = ["left", "row"] if has_two_pictures else ["row"]
    found = [
        [picture_at(corpus, example[side], image_size) for example in examples] for side in sides
    ]
    black = np.zeros((image_size, image_size, 3), dtype=np.uint8)
    images = [[black if one is None else one for one in pictures] for pictures in found]
    is_shown = [all(one is not None for one in pictures) for pictures in zip(*found, strict=True)]
    stacked = np.stack([np.stack(pictures) for pictures in images], axis=1)
    return stacked if has_two_pictures else stacked[:, 0], np.array(is_shown)


class _Predictor:
    """One process with the model."""

    def __init__(
        self, *, model: Path, on_gpu: bool, answering: Answering, answers: tuple[str, ...]
    ) -> None:
        device = "cuda" if on_gpu else "cpu"
        loaded = load_task(model, device=device)
        loaded.model.eval()
        self._loaded = dataclasses.replace(loaded, answers=answers) if answers else loaded
        self._answering = answering

    def __call__(self, block: Block) -> Block:
        images = torch.from_numpy(block["images"].copy())
        said = predict(self._loaded, images, list(block["texts"]), answering=self._answering)
        return {
            "number": block["number"],
            "answer": np.array(said.answers, dtype=object),
            "probability": said.probabilities.max(axis=1),
            "is_shown": block["is_shown"],
        }
