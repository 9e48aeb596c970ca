"""One picture of an ingest's input before it is read, and the ways in which it can be bad."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SPLIT_NAME = re.compile(r"(train|val|valid|validation|dev|test)\d*")

UNDECODABLE = "undecodable picture"
MISSING = "missing picture"
UNREADABLE = "unreadable file"
DAMAGED = "picture is not the one in the ledger"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
MALFORMED = "malformed record"
DUPLICATE = "duplicate id"
NOTHING_SAID = "neither caption nor annotation"
EMPTY_TEXT = "empty text"
NO_ANSWER = "question without answer"
NO_QUESTION = "answers without their question"
NO_GOLD_LABEL = "no gold label"
UNKNOWN_LABEL = "unknown label"
NO_PARTNER = "pair without its left picture"
NO_BOX = "expression without box"
NOT_A_BOX = "not a box"
CROWD = "box of a crowd"
OUTSIDE = "box outside the picture"
CLIPPED = "box clipped to the picture"


@dataclass(frozen=True)
class Bad:
    """Something of the input that cannot be used: its class, its name, and what was found.

    `is_entry`: one of several entries on a picture, so that the picture itself may still be used.
    """

    kind: str
    name: str
    detail: str
    is_entry: bool = False


class BadRecordError(Exception):
    """A record that is to be counted and left out."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Span:
    """Where bytes lie: a whole file, or `size` bytes of one from `offset` on."""

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
            BadRecordError: the file is missing, unreadable or too short.
        """
        try:
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                found = file.read(-1 if self.size is None else self.size)
        except FileNotFoundError:
            raise BadRecordError(MISSING, f"{self.path} is not there") from None
        except OSError as error:
            raise BadRecordError(UNREADABLE, f"{self.path}: {error.strerror}") from None
        if self.size is not None and len(found) < self.size:
            raise BadRecordError(
                UNREADABLE, f"{self.path} ends after {len(found)} of {self.size} bytes"
            )
        return found


@dataclass(frozen=True)
class Entry:
    """What one record holds: the encoded picture, raw captions, annotations as JSON.

    Without a caption it needs annotations, and be they `{}`, as of a left picture of a pair.
    """

    image: bytes
    captions: list[str]
    url: str | None = None
    annotations: str | None = None


class Record(Protocol):
    """One picture of the input, not read yet."""

    @property
    def image_id(self) -> str:
        """`source:key`, never a position."""
        ...

    @property
    def split(self) -> str | None:
        """Name of the split, where the input says it."""
        ...

    def load(self) -> Entry:
        """Read it, or raise BadRecordError."""
        ...


@dataclass
class Listing:
    """All records of the input, and what was unusable already when it was listed.

    `num_entries` counts what lists hold, several entries a picture: bad ones are a share of it.
    """

    records: list[Record] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    num_entries: int = 0


def without_duplicates(listing: Listing) -> Listing:
    """Keep the first of several records with one id: two pictures cannot share it."""
    kept: dict[str, Record] = {}
    for record in listing.records:
        if record.image_id in kept:
            bad = Bad(DUPLICATE, record.image_id, "another picture has this id already")
            listing.bad.append(bad)
        else:
            kept[record.image_id] = record
    return Listing(list(kept.values()), listing.bad, listing.num_entries)


def source_and_split(file: Path) -> tuple[str, str | None]:
    """Read the name of the source, and of the split where it has one, off a file's name.

    The source's name is the file's without split and digits (`cc3m_train.json`: cc3m, train);
    where nothing is left (`train.json`, `00012.tar`) it is the folder's.
    """
    words = [word for word in re.split(r"[-_.]+", file.stem) if word]
    splits = [match[1] for word in words if (match := SPLIT_NAME.fullmatch(word))]
    rest = [word for word in words if not SPLIT_NAME.fullmatch(word) and not word.isdigit()]
    return "-".join(rest) or file.resolve().parent.name, splits[0] if splits else None


def caption_fields(entry: Any) -> tuple[list[str], str | None]:
    """Take the captions and the URL out of a JSON entry.

    Raises:
        BadRecordError: it has no caption, or one that is no text.
    """
    if not isinstance(entry, dict):
        raise BadRecordError(MALFORMED, "not a JSON object")
    captions, url = entry.get("caption"), entry.get("url")
    if captions is None or captions == []:
        raise BadRecordError(NO_CAPTION, "no `caption`")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise BadRecordError(MALFORMED, "`caption` is neither a text nor a list of texts")
    return captions, url if isinstance(url, str) else None


def clean_unicode(text: str) -> str:
    """Normalize to NFC. Halves of surrogate pairs, which UTF-8 cannot hold, become `?`."""
    return unicodedata.normalize("NFC", text).encode("utf-8", errors="replace").decode("utf-8")


def count_bad(bad: Iterable[Bad]) -> dict[str, int]:
    """Count by class, the most frequent first."""
    counts: dict[str, int] = {}
    for one in bad:
        counts[one.kind] = counts.get(one.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
