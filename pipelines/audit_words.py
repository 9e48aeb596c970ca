"""A model's own words and captions for a picture (Fig. 2 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from albef_core.api import BLANK
from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.preprocess import resize_square
from albef_core.weights import LoadedModel
from pipelines.report import WordTarget

NUM_SHOWN = 5
"""Words and captions shown, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class NearestCaptions:
    """The captions of a corpus that a picture resembles most, the best first."""

    captions: Sequence[str]
    similarities: Sequence[float]
    """Their cosines with the picture."""


def nearest_captions(
    cosines: NDArray[np.float32], captions: Sequence[str], *, count: int = NUM_SHOWN
) -> NearestCaptions:
    """Find the captions of the highest cosines, those of several pictures once."""
    best: dict[str, float] = {}
    for text in np.argsort(-cosines, kind="stable"):
        best.setdefault(captions[int(text)], float(cosines[text]))
        if len(best) == count:
            break
    return NearestCaptions(captions=list(best), similarities=list(best.values()))


@torch.inference_mode()
def unlikeliest_word(
    loaded: LoadedModel, image: NDArray[np.uint8], caption: str, *, count: int = NUM_SHOWN
) -> WordTarget | None:
    """Mask each word in turn, and show where the model is surest that another one was there.

    That is where its best word beats the true one by the largest ratio. Words of several pieces,
    and those behind the longest text that the model reads, are left out; None if no word is left,
    or the model came without the head that names words. `loaded` must be in eval mode.
    """
    if any(name.startswith("mlm_head.") for name in loaded.report.missing):
        return None
    model, tokenizer, text = loaded.model, loaded.tokenizer, loaded.text_config
    device = model.temperature.device
    words = clean_caption(caption, max_words=text.max_words).split()
    # [CLS], the piece, and padding where there is no second one.
    pieces = tokenizer.encode(words, max_tokens=3, keep_sep=False, pad_to_max=True)
    blanked = [" ".join([*words[:n], BLANK, *words[n + 1 :]]) for n in range(len(words))]
    ids = tokenizer.encode(blanked, max_tokens=text.max_tokens, keep_sep=loaded.recipe.keep_sep)
    is_blank = ids == tokenizer.mask_id
    fits = (is_blank.sum(axis=1) == 1) & (pieces[:, 2] == tokenizer.pad_id)
    fits &= ~np.isin(pieces[:, 1], list(tokenizer.special_ids))
    rows = np.flatnonzero(fits)
    if not len(rows):
        return None
    square = torch.tensor(resize_square(image, loaded.model_config.image_size), device=device)
    image_tokens, _ = model.encode_image(normalize(square[None]))
    token_ids = torch.from_numpy(ids[rows]).to(device)
    mask = token_ids != tokenizer.pad_id
    text_tokens, _ = model.encode_text(token_ids, mask)
    fused = model.fuse(text_tokens, mask, image_tokens.expand(len(rows), -1, -1))
    blanks = torch.from_numpy(is_blank[rows]).to(device)
    # The model may have spare rows in its vocabulary.
    logits = model.mlm_head(fused[blanks])[:, : tokenizer.vocab_size]
    shares = logits.float().log_softmax(dim=1).cpu()
    best, places = shares.topk(min(count, shares.shape[1]), dim=1)
    true = shares[range(len(rows)), pieces[rows, 1].tolist()]
    worst = int((best[:, 0] - true).argmax())
    return WordTarget(
        image=image,
        masked_caption=blanked[rows[worst]],
        true_word=words[rows[worst]],
        words=tokenizer.words(places[worst].tolist()),
        probabilities=best[worst].exp().tolist(),
    )
