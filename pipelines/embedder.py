"""A model before a corpus: Ray tasks decode the pictures, actors encode them and their captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.config import ModelConfig
from albef_core.tasks.retrieval import EncodedImages, EncodedTexts, encode_texts, itm_logits
from albef_core.weights import LoadedModel, apply_weights, load_model
from pipelines.checkpoint import TEACHER_FILE, read_moving
from pipelines.cluster import check_actors, connect, pick_device
from pipelines.manifest import Manifest, RowGroup, read_row_group
from pipelines.pictures import DECODE_CPUS, Block, decoded, hold_order

STUDENT_ONLY = ("itm_head.", "temperature")
"""Of a model's weights those that a teacher has none of: ITM is not distilled (ALBEF 3.3)."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How a corpus is encoded."""

    model: Path
    """What `find_model` found, absolute."""
    batch_size: int
    actors: int
    """Processes that hold the model."""
    device: Literal["auto", "cpu", "cuda"]
    has_match: bool = False
    """Judge every pair by ITM as well, and by the teacher where the model has one."""


def load_judge(folder: Path, *, device: str | torch.device = "cpu") -> tuple[LoadedModel, bool]:
    """Load a model; a checkpoint's teacher (True) takes the student's place.

    The matching head and the temperature stay the student's: a teacher has none.

    Raises:
        InputError: it is absent, damaged, or fine-tuned for a task without ITC and ITM.
    """
    loaded = load_model(folder, device=device)
    file = folder / TEACHER_FILE
    if not file.is_file():
        return loaded, False
    teacher, _ = read_moving(file)
    apply_weights(loaded.model, teacher, source=str(file), may_miss=STUDENT_ONLY)
    return loaded, True


def embedded_tables(
    manifest: Manifest, groups: Sequence[RowGroup], embedding: Embedding, config: ModelConfig
) -> Iterator[pa.Table]:
    """Encode some row groups of a corpus, a table each, in their order; no row is ever dropped.

    Columns: `image_id`, `image_embedding` (all numbers null where the picture does not decode),
    `captions` as they are in the corpus, `caption_embeddings` (all numbers null where cleaning
    leaves no word), and with `has_match` `match_log_odds`, ITM's logit of "matched" less that of
    "not", one a caption. `config` is the model's. Joins Ray, or starts it.

    Raises:
        InputError: Ray has not the resources for so many actors.
    """
    connect()
    device = pick_device(embedding.device)
    check_actors(embedding.actors, device, cpus_left=DECODE_CPUS)
    encoder: Any = Encoder
    dataset = decoded(manifest, groups, image_size=config.image_size).map_batches(
        encoder,
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=embedding.actors),
        num_cpus=0 if device == "cuda" else 1,
        num_gpus=1 if device == "cuda" else 0,
        fn_constructor_kwargs={
            "corpus": manifest.folder.absolute(),
            "embedding": embedding,
            "device": device,
        },
    )
    hold_order(dataset, block_bytes=manifest.rows_per_group * 3 * config.image_size**2)
    tables: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return iter(tables)


class Encoder:
    """One process with the model."""

    def __init__(self, *, corpus: Path, embedding: Embedding, device: str) -> None:
        if embedding.has_match:
            self._loaded, _ = load_judge(embedding.model, device=device)
        else:
            self._loaded = load_model(embedding.model, device=device)
        self._loaded.model.eval()
        self._corpus, self._embedding = corpus, embedding

    def __call__(self, block: Block) -> pa.Table:
        """Encode one row group of decoded pictures, with its captions from the corpus."""
        shard, index = str(block["shard"][0]), int(block["index"][0])
        captions = read_row_group(self._corpus, shard, index, ["captions"])["captions"]
        return encode_rows(
            self._loaded,
            block["image"],
            captions.to_pylist(),
            image_ids=block["image_id"].tolist(),
            is_decoded=block["is_decoded"],
            batch_size=self._embedding.batch_size,
            has_match=self._embedding.has_match,
        )


def is_null(vectors: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Tell which vectors of a table are null."""
    nulls = [np.asarray(chunk.flatten().is_null(), dtype=bool) for chunk in vectors.chunks]
    return np.concatenate([np.empty(0, dtype=bool), *nulls])[:: vectors.type.list_size]


@torch.inference_mode()
def encode_rows(
    loaded: LoadedModel,
    pictures: NDArray[np.uint8],
    captions: list[list[str]],
    *,
    image_ids: list[str],
    is_decoded: NDArray[np.bool_],
    batch_size: int,
    has_match: bool,
) -> pa.Table:
    """Encode pictures (N, S, S, 3) with the captions of each; the columns of `embedded_tables`."""
    model, size = loaded.model, loaded.model_config.feature_size
    max_words = loaded.text_config.max_words
    texts = [[clean_caption(raw, max_words=max_words) for raw in own] for own in captions]
    image_features, text_features = [torch.empty(0, size)], [torch.empty(0, size)]
    log_odds = [torch.empty(0)]
    for start in range(0, len(texts), batch_size):
        rows = slice(start, start + batch_size)
        pixels = torch.from_numpy(pictures[rows].copy()).to(model.temperature.device)
        tokens, features = model.encode_image(normalize(pixels))
        image_features.append(features.float().cpu())
        owner = [row for row, own in enumerate(texts[rows]) for _ in own]
        if not owner:
            continue
        encoded = _read(loaded, [text for own in texts[rows] for text in own], batch_size)
        text_features.append(encoded.features.float().cpu())
        if has_match:
            images = EncodedImages(tokens=tokens, features=features)
            pairs = torch.tensor([owner, range(len(owner))], device=tokens.device).T
            logits = itm_logits(model, images, encoded, pairs, batch_size=batch_size).float()
            log_odds.append((logits[:, 1] - logits[:, 0]).cpu())
    starts = pa.array(np.cumsum([0, *map(len, captions)]), pa.int32())
    has_words = np.array([bool(text) for own in texts for text in own], dtype=bool)
    columns: dict[str, Any] = {
        "image_id": pa.array(image_ids, pa.string()),
        "image_embedding": _vectors(torch.cat(image_features), ~is_decoded),
        "captions": pa.array(captions, pa.list_(pa.string())),
        "caption_embeddings": pa.ListArray.from_arrays(
            starts, _vectors(torch.cat(text_features), ~has_words)
        ),
    }
    if has_match:
        odds = pa.array(torch.cat(log_odds).numpy(), pa.float32())
        columns["match_log_odds"] = pa.ListArray.from_arrays(starts, odds)
    return pa.table(columns)


def _read(loaded: LoadedModel, texts: list[str], batch_size: int) -> EncodedTexts:
    ids = loaded.tokenizer.encode(
        texts, max_tokens=loaded.text_config.max_tokens, keep_sep=loaded.recipe.keep_sep
    )
    token_ids = torch.from_numpy(ids).to(loaded.model.temperature.device)
    mask = token_ids != loaded.tokenizer.pad_id
    return encode_texts(loaded.model, token_ids, mask, batch_size=batch_size)


def _vectors(features: Tensor, is_null: NDArray[np.bool_]) -> pa.FixedSizeListArray:
    # Null are the numbers and not the list: pyarrow up to 25 writes null lists of a fixed size to
    # Parquet and cannot read them back (apache/arrow issue 35692).
    size = features.shape[1]
    mask = np.repeat(is_null, size)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(features.numpy().ravel(), pa.float32(), mask=mask), size
    )
