"""What a worker's step receives: which pairs its feed makes, and how they reach the device."""

from pathlib import Path

import numpy as np
import torch

from albef_core.batch import PairBatch, normalize
from pipelines.config import PretrainConfig
from pipelines.pairs import FeedBatch, FeedSpec


def feed_spec(config: PretrainConfig, start: Path) -> FeedSpec:
    """Describe the pairs of a training; `start` is the model folder that has the tokenizer."""
    return FeedSpec(
        corpus=config.corpus,
        tokenizer=str(start),
        text=config.text,
        augment=config.augment,
        image_size=config.model.image_size,
        mask_share=config.objective.mask_share,
        keep_sep=config.recipe.keep_sep,
        words_only=config.recipe.words_only,
        caption_policy=config.caption_policy,
        saturate_pixels=config.recipe.saturate_pixels,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def num_tokens(batch: FeedBatch, *, pad_id: int) -> int:
    """Count the tokens of the longest caption."""
    return int((batch.token_ids != pad_id).sum(axis=1).max())


def to_device(
    batch: FeedBatch, device: torch.device, *, pad_id: int, longest: int, num_global: int
) -> PairBatch:
    """Copy a batch to the device and normalize it there; captions are cut to `longest` tokens."""
    is_token = batch.token_ids != pad_id

    def words(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array[:, :longest], device=device)

    return PairBatch(
        images=normalize(torch.tensor(batch.images).to(device, non_blocking=True)),
        token_ids=words(batch.token_ids).long(),
        attention_mask=words(is_token),
        masked_ids=words(batch.masked_ids).long(),
        mlm_labels=words(batch.mlm_labels).long(),
        image_ids=torch.tensor(batch.image_keys, device=device),
        num_global=num_global,
    )
