"""A model of a few thousand random weights, and a corpus encoded by it without Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.model import ALBEF
from albef_core.tokenizer import Tokenizer
from albef_core.weights import save_model
from pipelines.embedder import Embedding, encode_rows, load_judge
from pipelines.manifest import Manifest, RowGroup, read_captions, read_row_group
from pipelines.model_card import CorpusSummary, Provenance, environment
from pipelines.pictures import _decode


def words_of(manifest: Manifest) -> Tokenizer:
    """Learn the vocabulary of a corpus."""
    captions = (caption for own in read_captions(manifest) for caption in own)
    return Tokenizer.learn(captions, vocab_size=200)


def save_small_model(folder: Path, tokenizer: Tokenizer, *, seed: int = 0, **sizes: int) -> ALBEF:
    """Write a model folder of random weights; `sizes` are fields of `ModelConfig` that differ."""
    config = ModelConfig(
        image_size=16, patch_size=8, image_width=16, image_layers=1, image_heads=2,
        text_width=16, text_heads=2, text_mlp_width=32, text_layers=1, fusion_layers=1,
        vocab_size=tokenizer.vocab_size, max_positions=32, feature_size=8,
    )  # fmt: skip
    config = replace(config, **sizes)
    torch.manual_seed(seed)
    model = ALBEF(config)
    save_model(
        folder,
        model,
        model_config=config,
        text_config=TextConfig(),
        recipe=Recipe(),
        tokenizer=tokenizer,
    )
    return model


def made_by_hand(manifest: Manifest | None = None, **more: Any) -> Provenance:
    """Say of a model that no training made it; `more` are fields of `Provenance`."""
    corpus = CorpusSummary(
        content_id="0" * 64, folder="/nowhere", num_images=0, num_captions=0, sources={}
    )
    made = Provenance(
        corpus=CorpusSummary.of(manifest) if manifest else corpus,
        recipe="corrected",
        seed=0,
        config={"optim": {"lr": 1e-4}},
        git_commit="unknown",
        environment=environment("cpu"),
        metrics={"val/error": 0.5},
        leaks=None,
        checkpoint={},
    )
    return replace(made, **more)


def encoded_here(
    manifest: Manifest, groups: Sequence[RowGroup], embedding: Embedding, config: ModelConfig
) -> Iterator[pa.Table]:
    """Do in this process what `embedder.embedded_tables` does through Ray."""
    loaded, _ = load_judge(embedding.model)
    loaded.model.eval()
    for group in groups:
        place = {"shard": np.array([group.shard]), "index": np.array([group.index])}
        block = _decode(place, folder=manifest.folder, image_size=config.image_size)
        captions = read_row_group(manifest.folder, group.shard, group.index, ["captions"])
        yield encode_rows(
            loaded,
            block["image"],
            captions["captions"].to_pylist(),
            image_ids=block["image_id"].tolist(),
            is_decoded=block["is_decoded"],
            batch_size=embedding.batch_size,
            has_match=embedding.has_match,
        )
