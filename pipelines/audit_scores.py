"""What a model thinks of the captions of a corpus: its answers as arrays, and one score of each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.embedder import is_null

NUM_REFERENCES = 4096
"""Captions, and pictures, that similarities are compared with."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A corpus as the model sees it: I pictures, and T captions in the order of the corpus."""

    image_ids: list[str]
    image_features: NDArray[np.float32]
    """(I, D); zeros where the picture does not decode."""
    is_decoded: NDArray[np.bool_]
    captions: list[str]
    """As they are in the corpus."""
    text_features: NDArray[np.float32]
    """(T, D); zeros where cleaning leaves no word."""
    has_words: NDArray[np.bool_]
    row: NDArray[np.int64]
    """The picture of each caption."""
    number: NDArray[np.int64]
    """The caption's place among its picture's."""
    log_odds: NDArray[np.float32]
    """ITM's logit of "matched" less that of "not"."""

    @property
    def is_judged(self) -> NDArray[np.bool_]:
        """Tell which captions have a score."""
        return self.has_words & self.is_decoded[self.row]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is thought of T captions; without meaning where they are not judged."""

    itc: NDArray[np.float32]
    """Cosine with the picture."""
    itm: NDArray[np.float32]
    """Probability of a match."""
    score: NDArray[np.float64]
    """See `disbelief`."""


def collect(tables: Iterable[pa.Table]) -> Judged:
    """Read the tables of `embedder.embedded_tables`, all of a corpus, with `has_match`."""
    table = pa.concat_tables(tables).combine_chunks()
    image_features, is_decoded = _matrix(table["image_embedding"])
    text_features, has_words = _matrix(pa.chunked_array(_flat(table["caption_embeddings"])))
    lengths = np.array([len(own) for own in table["captions"].to_pylist()], dtype=np.int64)
    row = np.repeat(np.arange(len(table)), lengths)
    return Judged(
        image_ids=table["image_id"].to_pylist(),
        image_features=image_features,
        is_decoded=is_decoded,
        captions=[caption for own in table["captions"].to_pylist() for caption in own],
        text_features=text_features,
        has_words=has_words,
        row=row,
        number=np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths),
        log_odds=np.concatenate([part.to_numpy() for part in _flat(table["match_log_odds"])]),
    )


def _flat(column: pa.ChunkedArray) -> list[Any]:
    return [chunk.flatten() for chunk in column.chunks]


def _matrix(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Give a column of vectors as rows, zeros for null; and which are not null."""
    values = np.concatenate([part.fill_null(0).to_numpy() for part in _flat(column)])
    return values.reshape(-1, column.type.list_size), ~is_null(column)


def disbelief(judged: Judged, temperature: float, *, seed: int) -> Scores:
    """Score each caption by how little the model believes that it was written for its picture.

    The score is the negative logarithm of p(caption | picture) / p(caption), in nats: the evidence
    for a caption drawn at random over one that belongs. It is the sum of two parts, which need no
    weights and no training, because each head has learned one of them:

    - ITC's softmax over a batch learns the share of that ratio that the two encoders can see. Its
      estimate for a pair is the similarity over temperature, less the logarithm of the mean of the
      exponentials with other captions (or, from the caption's side, other pictures): calibrated so
      that a picture which resembles everything gains nothing. The mean of both sides is taken.
    - ITM tells true pairs from negatives drawn by that very softmax (section 3.2), so its log-odds
      are the logarithm of what the softmax leaves out, up to a constant.

    The mean runs over at most `NUM_REFERENCES` captions and pictures of the corpus.
    """
    cosines = np.einsum("td,td->t", judged.image_features[judged.row], judged.text_features)
    rng = np.random.default_rng(seed)
    texts = _sample(np.flatnonzero(judged.is_judged), rng)
    images = _sample(np.unique(judged.row[judged.is_judged]), rng)
    of_image = _log_mean_exp(judged.image_features, judged.text_features[texts], temperature)
    of_text = _log_mean_exp(judged.text_features, judged.image_features[images], temperature)
    itc = cosines / temperature - (of_image[judged.row] + of_text) / 2
    log_odds = judged.log_odds.astype(np.float64)
    return Scores(
        itc=cosines,
        itm=(1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))).astype(np.float32),
        score=-(itc + log_odds),
    )


def _sample(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= NUM_REFERENCES else rng.choice(rows, NUM_REFERENCES, replace=False)


def _log_mean_exp(
    queries: NDArray[np.float32], keys: NDArray[np.float32], temperature: float
) -> NDArray[np.float64]:
    means = [np.empty(0)]
    for start in range(0, len(queries), ROWS_AT_ONCE):
        logits = (queries[start : start + ROWS_AT_ONCE] @ keys.T).astype(np.float64) / temperature
        top = logits.max(axis=1)
        means.append(top + np.log(np.exp(logits - top[:, None]).mean(axis=1)))
    return np.concatenate(means)
