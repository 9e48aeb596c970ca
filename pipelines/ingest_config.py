"""What ingest and its way back can be told: sources, cleaning, shards. Standard library only."""

from dataclasses import dataclass, field
from pathlib import Path

from albef_core.config import check_counts, check_range
from albef_core.errors import InputError

MAX_RADIUS = {"near_radius": 6, "leak_radius": 12}
"""Bits; docs/cleaning.md says why."""


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """What of a crawl is left out of a corpus; each step can be turned off (docs/cleaning.md)."""

    min_side: int = 200
    """Least pixels of the shorter side as it came, before resizing (ALIGN: 200); 0: any."""
    max_aspect: float = 3.0
    """Largest ratio of the longer to the shorter side (ALIGN: 3, CC12M: 2.5); 0: any."""
    min_words: int = 3
    """Least words of a caption (ALIGN and CC12M: 3); 0: any."""
    max_words: int = 256
    """Most words of a caption (CC12M: 256); 0: any."""
    max_repeats: int = 0
    """Leave out captions of more pictures than this (ALIGN: 10); 0: keep them, for CC3M's, with
    nouns in the place of names, repeat by nature."""
    exact_duplicates: bool = True
    """Keep one of pictures that are byte for byte the same, with the captions of all."""
    near_radius: int = 4
    """Bits in which the perceptual hashes of near duplicates may differ; -1: keep them all."""
    exclude_corpus: tuple[Path, ...] = ()
    """Corpora to evaluate on: their pictures are left out, by image id, URL, SHA-256 and look."""
    leak_radius: int = 8
    """Bits in which the perceptual hash may differ from that of an excluded picture; -1: looks are
    not compared."""
    min_likeness: float = 0.95
    """Least correlation of two pictures, 16 x 16 pixels in gray, of which --near-radius or
    --leak-radius says that they may be one."""

    def __post_init__(self) -> None:
        check_counts(self, "min_side", "min_words", "max_words", "max_repeats", least=0)
        check_counts(self, "near_radius", "leak_radius", least=-1)
        for name, most in MAX_RADIUS.items():
            if getattr(self, name) > most:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: too many unrelated pictures"
                    f" are that close. Pass at most {most}."
                )
        check_range(self, "max_aspect", low=0.0, high=1e6)
        check_range(self, "min_likeness", low=-1.0, high=1.0)
        if 0 < self.max_words < self.min_words:
            raise InputError(
                f"--max-words {self.max_words}: is less than --min-words {self.min_words}."
                " No caption would be left."
            )


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Build a corpus: a folder of Parquet shards and a manifest."""

    source: str
    """`shapes` for the generated set; JSON or JSON Lines of captions or annotations (ALBEF's lists,
    Karpathy's splits, SNLI-VE, VQA v2 questions, NLVR2, COCO); a tar of pictures with one such list
    beside it; a WebDataset tar or a pattern for several (`data/*.tar`); a crawl's folder."""
    out: Path
    """Folder of the new corpus; must not hold one already."""
    images: Path | None = None
    """Where a JSON list's pictures are: a folder or a tar. Default: beside the JSON, then
    `images.tar`."""
    annotations: tuple[Path, ...] = ()
    """More that is said of the source's pictures: VQA v2 answers, COCO instances, boxes of RefCOCO+
    {ref_id: [x, y, w, h]}, detector proposals {image_id: [[x, y, w, h], ...]}."""
    split: str = "all"
    """Split to keep, of those that the source names, as Karpathy's do: `train`, `val`, `test`..."""
    num_images: int = 1000
    """Pictures to generate (`shapes` only)."""
    wrong_captions: float = 0.0
    """Share of generated pictures whose caption belongs to another picture (`shapes` only)."""
    extra_words: float = 0.0
    """Share of generated captions with words of nothing that is seen (`shapes` only)."""
    seed: int = 0
    """Seed of the generated set and of the order in which rows are written."""
    max_bad_share: float = 0.5
    """Stop when more than this share of the input is unreadable."""
    rows_per_shard: int = 4096
    """Images in a shard."""
    rows_per_group: int = 256
    """Images in a Parquet row group."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """What of a crawl is left out (crawls only)."""
    experiment: str = "albef-ingest"
    """MLflow experiment of the run of a crawl's ingest; empty: no run (crawls only)."""

    def __post_init__(self) -> None:
        check_range(self, "wrong_captions", "extra_words", "max_bad_share", high=1.0)
        check_counts(self, "num_images", "rows_per_shard", "rows_per_group")
        check_counts(self, "seed", least=0)


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Write a corpus as WebDataset tars: KEY.jpg, KEY.txt and KEY.json of every picture."""

    corpus: Path
    """Corpus folder, as written by jobs/ingest.py."""
    out: Path
    """Folder of the tars; of an interrupted pack the missing ones are added."""
