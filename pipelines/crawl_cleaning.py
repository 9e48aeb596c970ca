"""What of a crawl becomes a corpus: captions, sizes, duplicates and leaks, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.crawl_rows import CrawlRows
from pipelines.crawl_store import Crawl
from pipelines.exclusion import find_leaked
from pipelines.ingest_config import CleaningConfig
from pipelines.looks import first_alike, read_looks
from pipelines.manifest import Manifest
from pipelines.near_duplicates import near_groups

Places = NDArray[np.int64]
NUM_PAIRS = 12

REMOVED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("pair", pa.string()),  # image id of what it is a copy of
        pa.field("corpus", pa.string()),  # folder of the excluded corpus that has the pair
    ]
)
"""One row a picture that was stored and left out: `report/removed.parquet`."""


@dataclass(frozen=True)
class Step:
    """One step of cleaning: what it leaves out, and how many `captions` or `pictures`."""

    name: str
    num_removed: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What is left of a crawl, and what went where."""

    pictures: Places
    """Rows of `CrawlRows.pictures` that stay, in list order."""
    captions: pa.LargeListArray
    """Captions of each."""
    steps: list[Step]
    removed: pa.Table
    """Of `REMOVED_SCHEMA`."""
    pairs: list[tuple[int, int]]
    """(left out, kept) rows of the first near duplicates, for a reader's eye."""


def clean(
    crawl: Crawl, rows: CrawlRows, config: CleaningConfig, excluded: Sequence[Manifest]
) -> Cleaned:
    """Choose the pictures and captions of a corpus.

    Of duplicates the first by list and row stays, so the choice depends on nothing else. Pictures
    are read only where a look is needed to tell two apart.
    """
    sieve = Sieve(crawl, rows)
    _sift_captions(sieve, config)
    _sift_sizes(sieve, config)
    sieve.drop_speechless()
    if config.exact_duplicates:
        _sift_exact_duplicates(sieve)
    pairs = _sift_near_duplicates(sieve, config) if config.near_radius >= 0 else []
    for corpus in excluded:
        _sift_leaks(sieve, config, corpus)
    sieve.drop_captions("said of pictures left out", ~sieve.is_kept[sieve.picture_of])
    return Cleaned(
        pictures=np.flatnonzero(sieve.is_kept),
        captions=sieve.kept_captions(),
        steps=sieve.steps,
        removed=pa.concat_tables([REMOVED_SCHEMA.empty_table(), *sieve.removed]),
        pairs=pairs,
    )


class Sieve:
    """Pictures and captions that are still in, and the account of those that are not."""

    def __init__(self, crawl: Crawl, rows: CrawlRows) -> None:
        self.rows, self.pictures, self.captions = rows, rows.pictures, rows.captions
        self.is_kept = np.ones(self.pictures.num_rows, dtype=bool)
        self.is_said = np.ones(self.captions.num_rows, dtype=bool)
        self.picture_of = self.captions["picture"].to_numpy().copy()
        self.hashes = self.captions["hash"].to_numpy()
        self.files = [crawl.pictures(name) for name in rows.files]
        self.steps: list[Step] = []
        self.removed: list[pa.Table] = []

    def column(self, name: str, places: Places) -> NDArray:
        """Take numbers of pictures."""
        return self.pictures[name].to_numpy()[places]

    def drop_captions(self, name: str, is_bad: NDArray[np.bool_]) -> None:
        """Leave out the marked captions, of those that are still in."""
        is_bad = is_bad & self.is_said
        self.steps.append(Step(name, int(is_bad.sum()), "captions"))
        self.is_said &= ~is_bad

    def drop_repeated(self, name: str) -> None:
        """Leave out captions that their picture has already; the first in list order stays."""
        order = np.lexsort((self.hashes, self.picture_of, ~self.is_said))
        hashes, pictures = self.hashes[order], self.picture_of[order]
        is_same = np.zeros(len(order), dtype=bool)
        is_same[order[1:]] = (hashes[1:] == hashes[:-1]) & (pictures[1:] == pictures[:-1])
        self.drop_captions(name, is_same)

    def drop_pictures(
        self,
        name: str,
        places: Places,
        *,
        pairs: pa.Array | None = None,
        corpus: str | None = None,
    ) -> None:
        """Leave out pictures, and note why and whose copies they are."""
        self.steps.append(Step(name, len(places), "pictures"))
        self.is_kept[places] = False
        length = len(places)
        columns = [
            self.rows.image_ids(places),
            self.pictures["url"].take(pa.array(places)),
            pa.repeat(name, length),
            pa.nulls(length) if pairs is None else pairs,
            pa.nulls(length) if corpus is None else pa.repeat(corpus, length),
        ]
        table = pa.table(columns, names=REMOVED_SCHEMA.names)
        self.removed.append(table.cast(REMOVED_SCHEMA))

    def drop_speechless(self) -> None:
        """Leave out pictures of which no caption is left."""
        has_caption = np.zeros(len(self.is_kept), dtype=bool)
        has_caption[self.picture_of[self.is_said]] = True
        self.drop_pictures("no caption left", np.flatnonzero(self.is_kept & ~has_caption))

    def kept_captions(self) -> pa.LargeListArray:
        """List the captions of each picture that stays, in list order."""
        said = np.flatnonzero(self.is_said)
        said = said[np.argsort(self.picture_of[said], kind="stable")]
        counts = np.bincount(self.picture_of[said], minlength=len(self.is_kept))[self.is_kept]
        ends = np.concatenate([[0], np.cumsum(counts)])
        texts = self.captions["caption"].take(pa.array(said)).combine_chunks()
        return pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), texts)


def _sift_captions(sieve: Sieve, config: CleaningConfig) -> None:
    words = sieve.captions["words"].to_numpy()
    sieve.drop_captions("empty caption", words == 0)
    sieve.drop_repeated("caption that its picture has already")
    if config.min_words:
        sieve.drop_captions(f"fewer than {config.min_words} words", words < config.min_words)
    if config.max_words:
        sieve.drop_captions(f"more than {config.max_words} words", words > config.max_words)
    if config.max_repeats:
        said = np.flatnonzero(sieve.is_said)
        _values, inverse, counts = np.unique(
            sieve.hashes[said], return_inverse=True, return_counts=True
        )
        is_common = np.zeros(len(sieve.is_said), dtype=bool)
        is_common[said] = counts[inverse] > config.max_repeats
        sieve.drop_captions(f"caption of more than {config.max_repeats} pictures", is_common)


def _sift_sizes(sieve: Sieve, config: CleaningConfig) -> None:
    smaller, larger = (sieve.pictures[name].to_numpy() for name in ("smaller_side", "larger_side"))
    if config.min_side:
        is_small = sieve.is_kept & (smaller < config.min_side)
        sieve.drop_pictures(f"smaller than {config.min_side} pixels", np.flatnonzero(is_small))
    if config.max_aspect:
        is_long = sieve.is_kept & (larger > config.max_aspect * smaller)
        sieve.drop_pictures(f"longer than {config.max_aspect:g} to 1", np.flatnonzero(is_long))


def _sift_exact_duplicates(sieve: Sieve) -> None:
    kept = np.flatnonzero(sieve.is_kept)
    digests = sieve.pictures["sha256"].take(pa.array(kept)).combine_chunks().dictionary_encode()
    _codes, first, inverse = np.unique(
        digests.indices.to_numpy(), return_index=True, return_inverse=True
    )
    owner = kept[first[inverse]]
    is_copy = owner != kept
    owner_of = np.arange(len(sieve.is_kept))
    owner_of[kept] = owner
    sieve.picture_of = owner_of[sieve.picture_of]
    copies, owners = kept[is_copy], owner[is_copy]
    sieve.drop_pictures("exact duplicate", copies, pairs=sieve.rows.image_ids(owners))
    sieve.drop_repeated("caption that its exact duplicate has already")


def _sift_near_duplicates(sieve: Sieve, config: CleaningConfig) -> list[tuple[int, int]]:
    kept = np.flatnonzero(sieve.is_kept)
    hashes = sieve.column("phash", kept)
    group = near_groups(hashes, config.near_radius)
    is_grouped = np.bincount(group, minlength=len(kept))[group] > 1
    kept, hashes, group = kept[is_grouped], hashes[is_grouped], group[is_grouped]
    looks = read_looks(sieve.files, sieve.column("file", kept), sieve.column("shard_row", kept))
    order = np.argsort(group, kind="stable")
    owner = np.empty_like(kept)
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        first = first_alike(
            hashes[members],
            looks[members],
            radius=config.near_radius,
            min_likeness=config.min_likeness,
        )
        owner[members] = kept[members[first]]
    copies, owners = kept[owner != kept], owner[owner != kept]
    sieve.drop_pictures("near duplicate", copies, pairs=sieve.rows.image_ids(owners))
    return list(zip(copies[:NUM_PAIRS].tolist(), owners[:NUM_PAIRS].tolist(), strict=True))


def _sift_leaks(sieve: Sieve, config: CleaningConfig, corpus: Manifest) -> None:
    kept = np.flatnonzero(sieve.is_kept)
    leaks = find_leaked(
        corpus,
        image_ids=sieve.rows.image_ids(kept),
        urls=sieve.pictures["url"].take(pa.array(kept)),
        sha256=sieve.pictures["sha256"].take(pa.array(kept)),
        hashes=sieve.column("phash", kept),
        looks_of=lambda some: read_looks(
            sieve.files, sieve.column("file", kept[some]), sieve.column("shard_row", kept[some])
        ),
        radius=config.leak_radius,
        min_likeness=config.min_likeness,
    )
    for kind, leak in leaks.items():
        name = f"in {corpus.folder} by {kind}"
        sieve.drop_pictures(name, kept[leak.places], pairs=leak.pairs, corpus=str(corpus.folder))
