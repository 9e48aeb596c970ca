"""The 80/10/10 masking of words in MLM (section 3.2), by the published rule."""

import numpy as np
from jaxtyping import Int32

from albef_core.tokenizer import Tokenizer

NOT_SCORED = -100
"""Label of a token that MLM does not score; cross-entropy ignores it."""


def mask_words(
    token_ids: Int32[np.ndarray, "*B L"],
    *,
    rng: np.random.Generator,
    mask_share: float,
    tokenizer: Tokenizer,
    words_only: bool,
) -> tuple[Int32[np.ndarray, "*B L"], Int32[np.ndarray, "*B L"]]:
    """Choose tokens for MLM to predict; return the changed ids and the labels.

    Each token is chosen with probability `mask_share`, but never [CLS], [SEP] or padding. Of the
    chosen, 80 % become [MASK], 10 % a random id and 10 % stay. Labels hold the original id of
    the chosen and `NOT_SCORED` elsewhere. Takes a batch, or one caption whose generator is its own;
    what is drawn depends on the shape.

    The random id is a word with `words_only`; else any id, special tokens too, as published.
    """
    shape = token_ids.shape
    is_scored = rng.random(shape) < mask_share
    for fixed_id in (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id):
        is_scored &= token_ids != fixed_id
    labels = np.where(is_scored, token_ids, np.int32(NOT_SCORED))

    choice = rng.random(shape)
    masked_ids = np.where(is_scored & (choice < 0.8), np.int32(tokenizer.mask_id), token_ids)
    is_random = is_scored & (choice >= 0.8) & (choice < 0.9)
    special_ids = sorted(tokenizer.special_ids) if words_only else []
    random_ids = rng.integers(tokenizer.vocab_size - len(special_ids), size=shape, dtype=np.int32)
    for special_id in special_ids:
        random_ids += random_ids >= special_id
    return np.where(is_random, random_ids, masked_ids), labels
