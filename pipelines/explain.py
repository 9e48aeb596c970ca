"""Where in a picture a model finds each word of a text: one picture, or a page of a corpus."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from albef_core.api import Albef
from albef_core.captions import clean_caption
from albef_core.errors import InputError
from albef_core.preprocess import UndecodableImage, decode_image
from albef_core.weights import load_model
from pipelines.config import ExplainConfig
from pipelines.explain_report import Explained, shrink, words_figure
from pipelines.manifest import read_manifest
from pipelines.model_store import find_model
from pipelines.pairs import open_corpus

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all."""
DPI = 120

Pair = tuple[str, UInt8[np.ndarray, "H W 3"], str]
"""Name of a picture, its pixels, its text."""


@dataclass(frozen=True, kw_only=True)
class ExplainResult:
    """What was drawn."""

    explained: tuple[Explained, ...]
    """In the order of the page; the pictures as small as they are drawn."""
    left_out: dict[str, int]
    """Rows of the corpus that were passed over, by what is wrong with them."""
    out: Path


def explain(config: ExplainConfig, *, on_progress: OnProgress = lambda *_: None) -> ExplainResult:
    """Draw a heat map for each word by Grad-CAM of ITM, as the paper's figures show.

    Raises:
        InputError: picture, text, corpus or model is absent, damaged or empty.
    """
    left_out: Counter[str] = Counter()
    if config.corpus is not None:
        pairs, total = _corpus_pairs(config.corpus, left_out)
        total = min(config.num, total)
    else:
        assert config.image is not None
        pairs, total = iter([_pair(config.image, config.text)]), 1
    loaded = load_model(find_model("--model", config.model), device=_device(config.device))
    albef = Albef(loaded)
    explained: list[Explained] = []
    for name, image, text in islice(pairs, total):
        (found,) = albef.explain([image], [text], layer=config.layer, head=config.head)
        explained.append(
            Explained(
                image=shrink(image),
                name=name,
                text=text,
                words=found.words,
                maps=found.maps,
                match=found.match,
            )
        )
        on_progress("pictures", len(explained), total)
    if not explained:
        raise InputError(
            f"{config.corpus}: none of its pictures decodes and has a caption. Pass another corpus."
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    words_figure(explained).savefig(config.out, bbox_inches="tight", dpi=DPI)
    return ExplainResult(explained=tuple(explained), left_out=dict(left_out), out=config.out)


def _pair(image: Path, text: str) -> Pair:
    if not clean_caption(text, max_words=1):
        raise InputError(f"--text {text!r}: cleaning leaves no word of it. Give a text with words.")
    try:
        return image.name, decode_image(image.read_bytes()), text
    except UndecodableImage as error:
        raise InputError(
            f"--image {image}: cannot be decoded ({error}). Give a JPEG, PNG, WebP or GIF."
        ) from None


def _corpus_pairs(folder: Path, left_out: Counter[str]) -> tuple[Iterator[Pair], int]:
    """Give the rows that decode with their first caption that has a word, and count all rows."""
    total = read_manifest(folder).num_images
    corpus = open_corpus(folder.absolute())

    def pairs() -> Iterator[Pair]:
        for row in range(total):
            source = corpus.read(row)
            texts = [text for text in source.captions if clean_caption(text, max_words=1)]
            if not texts:
                left_out["no caption"] += 1
                continue
            try:
                pixels = decode_image(source.image)
            except UndecodableImage:
                left_out["a picture that does not decode"] += 1
                continue
            yield source.image_id, pixels, texts[0]

    return pairs(), total


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU. Use --device auto or cpu.")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
