"""From a place in the plan to a finished pair: read, decode, augment, tokenize, mask.

A pair depends on (seed, epoch, image) alone: neither the worker nor the process nor the order of
calls changes a pixel or a word. Imports no torch, because every task process would pay for it.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from albef_core.captions import clean_caption
from albef_core.config import TextConfig
from albef_core.errors import InputError
from albef_core.masking import mask_words
from albef_core.preprocess import UndecodableImage, augment, decode_image
from albef_core.tokenizer import Tokenizer
from pipelines.config import AugmentConfig
from pipelines.manifest import RowGroup, read_manifest, read_row_group
from pipelines.order import WINDOW_GROUPS, Stream, epoch_slice, generator, steps_per_epoch

MAX_STAND_INS = 64
"""Pictures in a row that may fail to decode before the feed gives up."""
COLUMNS = ("image", "image_id", "captions")


@dataclass(frozen=True, kw_only=True)
class FeedSpec:
    """All that a task needs to make any pair of the run; small, and the same for every worker."""

    corpus: Path
    """Corpus folder, absolute."""
    tokenizer: str
    """Folder written by `Tokenizer.save`, absolute."""
    text: TextConfig
    augment: AugmentConfig
    image_size: int
    """Height and width of the finished pictures in pixels."""
    mask_share: float
    """Share of tokens that MLM masks."""
    keep_sep: bool
    """Captions end in [SEP]."""
    words_only: bool
    """Random tokens of masking are words."""
    seed: int
    """Seed of the run."""
    batch_size: int
    """Pairs in a global batch, over all workers."""
    caption_policy: Literal["random", "all"] = "random"
    """One of an image's captions at random, or all in turn, one an epoch."""
    saturate_pixels: bool = True
    """RandAugment stops at 0 and 255 instead of overflowing."""
    rows_per_block: int = 256
    """Most pairs that one task prepares."""

    def count(self) -> int:
        """Count the pairs of an epoch: one an image."""
        return open_corpus(self.corpus).num_images

    def prepare(self, *, step: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Make pairs start to stop of the global batch of one step: `prepare_block`."""
        return prepare_block(self, step=step, start=start, stop=stop)

    def collect(self, step: int, epoch: int, columns: dict[str, NDArray[Any]]) -> "FeedBatch":
        """Make a worker's batch of the columns of its pairs."""
        return FeedBatch(
            step=step,
            epoch=epoch,
            images=columns["images"],
            token_ids=columns["token_ids"],
            masked_ids=columns["masked_ids"],
            mlm_labels=columns["mlm_labels"],
            image_keys=columns["image_keys"],
            image_ids=list(columns["image_ids"]),
            captions=list(columns["captions"]),
            bad_ids=[image_id for image_id in columns["bad_ids"] if image_id],
        )


@dataclass(frozen=True, kw_only=True)
class FeedBatch:
    """One worker's share of one global step; the arrays may be read-only views of shared memory."""

    step: int
    """Global step, from 0 over all epochs."""
    epoch: int
    images: NDArray[np.uint8]
    """Augmented pictures (B, S, S, 3)."""
    token_ids: NDArray[np.int32]
    """Captions (B, L), padded to `max_tokens`."""
    masked_ids: NDArray[np.int32]
    """The captions with some words replaced (B, L)."""
    mlm_labels: NDArray[np.int32]
    """The original id where MLM is scored, -100 elsewhere (B, L)."""
    image_keys: NDArray[np.int64]
    """`pairs.image_key` of every picture (B)."""
    image_ids: list[str]
    captions: list[str]
    """The chosen captions as they are in the corpus."""
    bad_ids: list[str]
    """Images that were due and would not decode; the next one in the order stands in for each."""

    @property
    def num_bad(self) -> int:
        """Count the pictures that would not decode."""
        return len(self.bad_ids)


@dataclass(frozen=True)
class Source:
    """One image of the corpus as it is stored."""

    image: bytes
    image_id: str
    captions: list[str]


@dataclass(frozen=True)
class Corpus:
    """The part of a manifest that finds a row: row groups in order, and how many rows each has."""

    folder: Path
    groups: list[RowGroup]
    group_rows: NDArray[np.int64]
    group_stops: NDArray[np.int64]

    @property
    def num_images(self) -> int:
        """Count the rows of all groups."""
        return int(self.group_stops[-1])

    def read(self, row: int) -> Source:
        """Read one row, by its number over all row groups."""
        number = int(np.searchsorted(self.group_stops, row, side="right"))
        group = self.groups[number]
        table = _row_group(self.folder, group.shard, group.index)
        offset = row - int(self.group_stops[number] - self.group_rows[number])
        return Source(*(table[name][offset].as_py() for name in COLUMNS))


def prepare_block(spec: FeedSpec, *, step: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
    """Make pairs start to stop of the global batch of one step.

    A picture that does not decode is replaced by the next one in the epoch's order that does.

    Returns:
        One column a field, one row a pair. `bad_ids` holds the image that was due where another
        one stands in, else "".

    Raises:
        InputError: `MAX_STAND_INS` pictures in a row do not decode, or one has no caption.
    """
    corpus = open_corpus(spec.corpus)
    epoch, step_of_epoch = divmod(step, steps_per_epoch(corpus.num_images, spec.batch_size))
    first = step_of_epoch * spec.batch_size
    rows = _rows(spec, corpus, epoch=epoch, start=first + start, stop=first + stop)
    images = np.empty((stop - start, spec.image_size, spec.image_size, 3), dtype=np.uint8)
    sources: list[Source] = []
    captions, generators, bad_ids = [], [], []
    for index in range(stop - start):
        source, pixels, due = _decode(corpus, rows[index : index + MAX_STAND_INS])
        # Keyed by the image that was due, so that a stand-in is a second view and not a copy.
        rng = generator(Stream.PAIR, seed=spec.seed, epoch=epoch, item=image_key(due))
        captions.append(_caption(spec, source, epoch=epoch, rng=rng))
        images[index] = _augmented(spec, pixels, rng)
        sources.append(source)
        generators.append(rng)
        bad_ids.append("" if due == source.image_id else due)
    return {
        "step": np.full(stop - start, step),
        "position": np.arange(start, stop),
        "images": images,
        "image_keys": np.array([image_key(source.image_id) for source in sources]),
        "image_ids": np.array([source.image_id for source in sources], dtype=object),
        "captions": np.array(captions, dtype=object),
        "bad_ids": np.array(bad_ids, dtype=object),
        **_words(spec, captions, generators),
    }


def image_key(image_id: str) -> int:
    """Hash an image id to a number of 63 bits, never negative."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest()) >> 1


@lru_cache(maxsize=4)
def open_corpus(folder: Path) -> Corpus:
    """Read a corpus's manifest, once a process."""
    groups = read_manifest(folder).row_groups()
    rows = np.array([group.rows for group in groups], dtype=np.int64)
    return Corpus(folder, groups, rows, np.cumsum(rows))


def _rows(
    spec: FeedSpec, corpus: Corpus, *, epoch: int, start: int, stop: int
) -> NDArray[np.int64]:
    """Find the rows at some positions and at `MAX_STAND_INS` after them, round the epoch's end."""
    order = partial(epoch_slice, corpus.group_rows, seed=spec.seed, epoch=epoch)
    beyond = stop + MAX_STAND_INS - corpus.num_images
    rows = order(start=start, stop=min(stop + MAX_STAND_INS, corpus.num_images))
    if beyond <= 0:
        return rows
    return np.concatenate([rows, order(start=0, stop=min(beyond, corpus.num_images))])


def _decode(corpus: Corpus, candidates: NDArray[np.int64]) -> tuple[Source, NDArray[np.uint8], str]:
    """Decode the first of the rows that will; also name the image of the very first."""
    due = ""
    for row in candidates:
        source = corpus.read(int(row))
        due = due or source.image_id
        try:
            return source, decode_image(source.image), due
        except UndecodableImage:
            continue
    raise InputError(
        f"{corpus.folder}: {len(candidates)} images in a row do not decode, from {due!r} on."
        " The corpus is damaged: copy it again, or ingest its source once more."
    )


def _caption(spec: FeedSpec, source: Source, *, epoch: int, rng: np.random.Generator) -> str:
    count = len(source.captions)
    if not count:
        raise InputError(
            f"{spec.corpus}: {source.image_id} has no caption, and pre-training needs one of each"
            " picture. Pass a corpus of captions."
        )
    if spec.caption_policy == "random":
        return source.captions[rng.integers(count)]
    # An order of its own for every image, the same in all epochs: after `count` of them all have
    # been seen once.
    key = image_key(source.image_id)
    turns = generator(Stream.CAPTIONS, seed=spec.seed, epoch=0, item=key).permutation(count)
    return source.captions[turns[epoch % count]]


def _augmented(
    spec: FeedSpec, pixels: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    return augment(
        pixels,
        size=spec.image_size,
        crop_scale_min=spec.augment.crop_scale_min,
        flip=spec.augment.flip,
        rand_ops=spec.augment.rand_ops,
        rand_level=spec.augment.rand_level,
        rng=rng,
        saturate=spec.saturate_pixels,
    )


def _words(
    spec: FeedSpec, captions: list[str], generators: list[np.random.Generator]
) -> dict[str, NDArray[np.int32]]:
    """Tokenize the captions, then mask each with the generator of its own pair."""
    tokenizer = _tokenizer(spec.tokenizer)
    token_ids = tokenizer.encode(
        [clean_caption(caption, max_words=spec.text.max_words) for caption in captions],
        max_tokens=spec.text.max_tokens,
        keep_sep=spec.keep_sep,
        pad_to_max=True,
    )
    masked_ids, labels = np.empty_like(token_ids), np.empty_like(token_ids)
    for index, rng in enumerate(generators):
        masked_ids[index], labels[index] = mask_words(
            token_ids[index],
            rng=rng,
            mask_share=spec.mask_share,
            tokenizer=tokenizer,
            words_only=spec.words_only,
        )
    return {"token_ids": token_ids, "masked_ids": masked_ids, "mlm_labels": labels}


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)


# A window's row groups: a task that walks the order needs no more at once.
@lru_cache(maxsize=WINDOW_GROUPS)
def _row_group(folder: Path, shard: str, index: int) -> pa.Table:
    return read_row_group(folder, shard, index, COLUMNS)
