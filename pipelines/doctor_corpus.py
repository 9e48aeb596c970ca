"""The doctor's look at the data: pictures and captions that really read, a tokenizer that fits."""

import hashlib
import json
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from albef_core.captions import clean_caption
from albef_core.config import TextConfig
from albef_core.errors import InputError
from albef_core.preprocess import UndecodableImage, decode_image
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model
from pipelines.config import PretrainConfig
from pipelines.doctor_finding import Finding, Problem
from pipelines.ingest_report import REPORT_FOLDER
from pipelines.manifest import Manifest, read_row_group
from pipelines.order import steps_per_epoch

MAX_PICTURES = 1000
READ_SECONDS = 8.0
"""Pictures are read until so many, or so long: a random part of the corpus, as the seed says."""
NUM_CAPTIONS = 1000
LEARNED_FROM = 200_000
"""Captions of a vocabulary learned for the check; the training learns from all of them."""
MAX_EMPTY_SHARE = 0.01
MAX_UNKNOWN_SHARE = 0.01
MAX_CUT_SHARE = 0.1
MIN_ROUND_TRIP = 0.99
ANY_LENGTH = 10_000


def check_corpus(config: PretrainConfig, manifest: Manifest) -> Finding:
    """Read a random sample of row groups: hashes, decoding, captions; the leak report; the size."""
    counts = Counter[str]()
    stop = time.monotonic() + READ_SECONDS
    for row in _random_rows(manifest, ["image", "sha256", "captions"], seed=config.seed):
        counts["pictures"] += 1
        counts["changed"] += hashlib.sha256(row["image"]).digest() != row["sha256"]
        counts["broken"] += not _decodes(row["image"])
        counts["captions"] += len(row["captions"])
        counts["empty"] += sum(
            not clean_caption(text, max_words=config.text.max_words) for text in row["captions"]
        )
        if counts["pictures"] == MAX_PICTURES or time.monotonic() > stop:
            break
    measured = (
        f"{counts['pictures']:,} of {manifest.num_images:,} pictures read: {counts['changed']}"
        f" with another sha256, {counts['broken']} do not decode;"
        f" {counts['empty']} of {counts['captions']:,} captions empty after cleaning"
    )
    problems = [
        *_picture_problems(config, counts),
        *_size_problems(config, manifest),
        *_leak_problems(manifest.folder),
    ]
    if counts["empty"] > MAX_EMPTY_SHARE * counts["captions"]:
        problems.append(
            Problem("warn", "Empty captions teach nothing: drop those pairs and ingest again.")
        )
    return Finding.of(measured, problems)


def _picture_problems(config: PretrainConfig, counts: Counter[str]) -> Iterator[Problem]:
    if counts["changed"]:
        yield Problem(
            "fail",
            f"{config.corpus}: its pictures are not the ones that were ingested. Copy the corpus"
            " again, or ingest its source once more.",
        )
    if counts["broken"] > config.max_bad_share * counts["pictures"]:
        share = counts["broken"] / counts["pictures"]
        yield Problem(
            "fail",
            f"{share:.1%} do not decode, and --max-bad-share {config.max_bad_share} would stop the"
            " run: ingest the source again, which leaves such pictures out.",
        )
    elif counts["broken"]:
        yield Problem("warn", "Training replaces pictures that do not decode, and counts them.")


def _size_problems(config: PretrainConfig, manifest: Manifest) -> Iterator[Problem]:
    try:
        steps_per_epoch(manifest.num_images, config.batch_size)
    except InputError as error:
        yield Problem("fail", str(error))


def _leak_problems(folder: Path) -> Iterator[Problem]:
    """Read `leaks` of the ingest's report: pictures shared with each test set, by its name."""
    path = folder / REPORT_FOLDER / "report.json"
    leaks = json.loads(path.read_text(encoding="utf-8")).get("leaks") if path.is_file() else None
    if leaks is None:
        yield Problem(
            "warn",
            "Not checked against the test sets: pictures of them in the corpus would make"
            " evaluations look better than they are.",
        )
    elif shared := {name: count for name, count in leaks.items() if count}:
        names = ", ".join(f"{count} of {name}" for name, count in shared.items())
        yield Problem("fail", f"The corpus holds test pictures ({names}): ingest without them.")


def sample_captions(manifest: Manifest, count: int, *, seed: int) -> list[str]:
    """Take the captions of random row groups until there are `count`."""
    captions: list[str] = []
    for row in _random_rows(manifest, ["captions"], seed=seed):
        captions += row["captions"]
        if len(captions) >= count:
            break
    return captions[:count]


def open_tokenizer(config: PretrainConfig, manifest: Manifest) -> tuple[Tokenizer, int]:
    """Open the tokenizer that a training would take, and say how many words its model holds.

    Raises:
        InputError: there is none, or it lacks a special token.
    """
    if config.init:
        start = load_model(config.init)
        return start.tokenizer, start.model_config.vocab_size
    tokenizer = learn_tokenizer(config, manifest)
    if config.text.tokenizer != "corpus":
        tokenizer = Tokenizer.load(config.text.tokenizer)
    return tokenizer, config.model.vocab_size or tokenizer.vocab_size


def learn_tokenizer(config: PretrainConfig, manifest: Manifest) -> Tokenizer:
    """Learn a vocabulary as `--tokenizer corpus` does, from a part of a large corpus."""
    captions = sample_captions(manifest, LEARNED_FROM, seed=config.seed)
    return Tokenizer.learn(captions, vocab_size=config.text.corpus_vocab_size)


def check_tokenizer(
    tokenizer: Tokenizer, num_words: int, config: PretrainConfig, manifest: Manifest
) -> Finding:
    """Encode captions of the corpus and read them back; compare the vocabulary with the model.

    A `Tokenizer` cannot be made without [CLS], [SEP], [MASK], [PAD] and [UNK].
    """
    text = config.text
    captions = [
        clean_caption(caption, max_words=text.max_words)
        for caption in sample_captions(manifest, NUM_CAPTIONS, seed=config.seed)
    ]
    rows = [row[row != tokenizer.pad_id] for row in _encode(tokenizer, captions)]
    pieces = sum(len(row) - 2 for row in rows)
    unknown = sum(int((row == tokenizer.unk_id).sum()) for row in rows)
    known = [
        (caption, row)
        for caption, row in zip(captions, rows, strict=True)
        if tokenizer.unk_id not in row
    ]
    whole = sum(_bare(caption) == _bare(_joined(tokenizer, row)) for caption, row in known)
    longest = text.max_tokens + (0 if config.recipe.keep_sep else 1)
    cut = sum(len(row) > longest for row in rows)
    measured = (
        f"{tokenizer.vocab_size:,} word pieces, all special tokens; {len(rows):,} captions:"
        f" {unknown / max(1, pieces):.2%} of pieces [UNK], {whole} of {len(known):,} read back,"
        f" {cut / max(1, len(rows)):.1%} cut at {text.max_tokens} tokens"
    )
    problems = list(_vocabulary_problems(tokenizer, num_words, text))
    if unknown > MAX_UNKNOWN_SHARE * pieces:
        problems.append(
            Problem("warn", "Many words are unknown to the vocabulary: take --tokenizer corpus.")
        )
    if whole < MIN_ROUND_TRIP * len(known):
        problems.append(
            Problem(
                "fail",
                f"--tokenizer {text.tokenizer} does not give captions back: it is not the lower"
                "-case WordPiece of BERT. Take bert-base-uncased or `corpus`.",
            )
        )
    if cut > MAX_CUT_SHARE * len(rows):
        problems.append(Problem("warn", "Many captions lose their end: raise --max-tokens."))
    return Finding.of(measured, problems)


def _vocabulary_problems(
    tokenizer: Tokenizer, num_words: int, text: TextConfig
) -> Iterator[Problem]:
    if tokenizer.vocab_size > num_words:
        yield Problem(
            "fail",
            f"--vocab-size {num_words} is less than the {tokenizer.vocab_size} word pieces of"
            f" --tokenizer {text.tokenizer}: leave it out, or take a larger one.",
        )


def _encode(tokenizer: Tokenizer, captions: list[str]) -> np.ndarray:
    """Encode captions whole: never cut, [SEP] at the end."""
    return tokenizer.encode(captions, max_tokens=ANY_LENGTH, keep_sep=True)


def _joined(tokenizer: Tokenizer, row: np.ndarray) -> str:
    return "".join(piece.removeprefix("##") for piece in tokenizer.words(row[1:-1]))


def _bare(text: str) -> str:
    """Leave out what BERT's normalizer changes: accents and white space."""
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in letters if not c.isspace() and unicodedata.category(c) != "Mn")


def _random_rows(manifest: Manifest, columns: list[str], *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of random row groups, each group once."""
    groups = manifest.row_groups()
    for number in np.random.default_rng(seed).permutation(len(groups)):
        group = groups[number]
        yield from read_row_group(manifest.folder, group.shard, group.index, columns).to_pylist()


def _decodes(encoded: bytes) -> bool:
    try:
        decode_image(encoded)
    except UndecodableImage:
        return False
    return True
