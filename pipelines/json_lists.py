"""Files of captions and annotations in JSON, with the pictures in a folder or a tar."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from albef_core.errors import InputError
from pipelines.annotation_entries import KNOWN_ENTRIES, Note, entry_readers
from pipelines.annotation_extras import Extras
from pipelines.annotation_files import Read, read_json, read_object
from pipelines.records import (
    DUPLICATE,
    MALFORMED,
    MISSING,
    NO_PARTNER,
    NOTHING_SAID,
    UNREADABLE,
    Bad,
    BadRecordError,
    Entry,
    Listing,
    Record,
    Span,
    source_and_split,
)
from pipelines.tars import tar_members

COCO_YEAR = re.compile(r"(?:train|val|test)\d{4}")
MAX_LINE = 2**20
"""Bytes of a line that is still looked at to see if a file holds one entry a line."""


@dataclass(frozen=True, slots=True)
class ListedRecord:
    """A picture of which a list tells captions and annotations."""

    image_id: str
    split: str | None
    image: Span
    captions: tuple[str, ...]
    url: str | None
    annotations: str | None

    def load(self) -> Entry:
        """Read the picture."""
        return Entry(self.image.read(), list(self.captions), self.url, self.annotations)


@dataclass
class _Picture:
    """All that lists say of one picture."""

    names: tuple[str, ...]
    image_id: str = ""
    has_key: bool = False
    place: Span | None = None
    split: str | None = None
    url: str | None = None
    captions: list[str] = field(default_factory=list)
    annotations: dict[str, list[Any]] = field(default_factory=dict)
    is_left: bool = False

    def add(self, other: "Note | _Picture") -> None:
        self.split = self.split or other.split
        self.url = self.url or other.url
        self.captions += other.captions
        self.is_left |= other.is_left

    def count(self) -> dict[str, int]:
        """Count what is said, and what is lost where the picture is missing."""
        counts = {"captions": len(self.captions)}
        counts |= {kind: len(values) for kind, values in self.annotations.items()}
        return {kind: count for kind, count in counts.items() if count}


def list_json(
    files: list[Path], images: Path | None, *, extras: Extras, split: str = "all"
) -> Listing:
    """List the pictures of some lists: all that they say of one picture becomes one record.

    Pictures of other splits than `split` are not looked for.

    Raises:
        InputError: a file is none of the known forms, `extras` belong to other pictures, or no
            picture is of that split.
    """
    if images is not None and not images.exists():
        raise InputError(f"--images {images}: no such folder or tar.")
    bad = list(extras.bad)
    kept: dict[str, _Picture] = {}
    splits = set[str]()
    for file in files:
        finder = _PictureFinder(file, images, bad)
        for picture in _read_file(file, extras, bad):
            splits.add(picture.split or "")
            if split in ("all", picture.split):
                _keep(picture, finder, kept, bad)
    if split != "all" and split not in splits:
        found = ", ".join(sorted(splits - {""})) or "no split"
        raise InputError(
            f"--split {split}: the source has {found}. Pass one of its splits, or all."
        )
    for picture in kept.values():
        names = _ids_of_others(picture)
        bad += extras.add_to(picture.annotations, names=names, image_id=picture.image_id)
    extras.check_used(", ".join(file.name for file in files[:3]))
    records: list[Record] = list(_records(kept, bad))
    num_entries = sum(sum(picture.count().values()) for picture in kept.values())
    return Listing(records, bad, num_entries)


def _read_file(file: Path, extras: Extras, bad: list[Bad]) -> list[_Picture]:
    """Read one list: what it says, picture by picture, in its order."""
    source, split = source_and_split(file)
    pictures: dict[str, _Picture] = {}
    for item in _read(file, extras):
        if isinstance(item, Bad):
            bad.append(item)
            continue
        for note in item:
            name = note.pictures[0]
            picture = pictures.setdefault(name, _Picture(note.pictures))
            picture.add(note)
            # The first entry that has a key names the picture.
            if (note.key and not picture.has_key) or not picture.image_id:
                picture.image_id = f"{note.source or source}:{note.key or name}"
                picture.has_key = bool(note.key)
            if note.kind:
                picture.annotations.setdefault(note.kind, []).append(note.value)
    for picture in pictures.values():
        picture.split = picture.split or split
        for pair in picture.annotations.get("pairs", []):
            pair["left"] = pictures[pair["left"]].image_id
    return list(pictures.values())


def _keep(
    picture: _Picture, finder: "_PictureFinder", kept: dict[str, _Picture], bad: list[Bad]
) -> None:
    """Find a picture and put it with what other files say of it."""
    picture.place = finder.find(picture.names)
    image_id = picture.image_id
    if picture.place is None:
        lost = ", ".join(f"{count} {kind}" for kind, count in picture.count().items())
        detail = f"{picture.names[0]} is not in {finder.places}"
        bad.append(Bad(MISSING, image_id, f"{detail}; with it {lost}" if lost else detail))
    elif image_id not in kept:
        kept[image_id] = picture
    elif kept[image_id].place == picture.place:
        kept[image_id].add(picture)
        for kind, values in picture.annotations.items():
            kept[image_id].annotations.setdefault(kind, []).extend(values)
    else:
        bad.append(Bad(DUPLICATE, image_id, "another picture has this id already"))


def _ids_of_others(picture: _Picture) -> list[str]:
    """List the names that other files may have for a picture; COCO's is the number in its name."""
    stem = PurePosixPath(picture.names[0]).stem
    number = re.fullmatch(r"(?:COCO_[a-z]+\d+_)?0*(\d+)", stem)
    key = picture.image_id.partition(":")[2]
    return [key, *([number[1]] if number else []), stem, PurePosixPath(picture.names[0]).name]


def _records(pictures: dict[str, _Picture], bad: list[Bad]) -> Iterator[ListedRecord]:
    for image_id, picture in pictures.items():
        assert picture.place is not None
        if pairs := picture.annotations.get("pairs"):
            kept = [pair for pair in pairs if pair["left"] in pictures]
            bad += [
                Bad(NO_PARTNER, image_id, f"{pair['left']}: {pair['sentence']}", is_entry=True)
                for pair in pairs
                if pair["left"] not in pictures
            ]
            picture.annotations["pairs"] = kept
        annotations = {kind: values for kind, values in picture.annotations.items() if values}
        if not picture.captions and not annotations and not picture.is_left:
            bad.append(Bad(NOTHING_SAID, image_id, ""))
            continue
        has_annotations = annotations or not picture.captions
        yield ListedRecord(
            image_id,
            picture.split,
            picture.place,
            tuple(picture.captions),
            picture.url,
            json.dumps(annotations) if has_annotations else None,
        )


def _read(file: Path, extras: Extras) -> Read:
    if _has_lines(file):
        return _read_entries(file, _lines(file))
    body = read_json(file)
    if isinstance(body, list):
        entries = ((f"entry {number}", entry) for number, entry in enumerate(body))
        return _read_entries(file, entries)
    if isinstance(body, dict):
        return read_object(file, body, answers=extras.answers)
    raise InputError(
        f"{file}: the JSON is a value. Accepted are lists of entries ({KNOWN_ENTRIES})."
    )


def _has_lines(file: Path) -> bool:
    """Tell JSON Lines by its suffix, or by a first line that is an entry, as in NLVR2's .json."""
    if file.suffix.lower() == ".jsonl":
        return True
    with file.open("rb") as lines:
        first = lines.readline(MAX_LINE)
    try:
        return bool(entry_readers(json.loads(first)))
    except ValueError:
        return False


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError:
                yield f"line {number}", line


def _read_entries(file: Path, entries: Iterator[tuple[str, Any]]) -> Read:
    """Read entries with the place of each; a list of which none is known is refused."""
    is_known, first = False, None
    for place, entry in entries:
        first = entry if first is None else first
        readers = entry_readers(entry)
        name = entry.get("image") if isinstance(entry, dict) else None
        label = f"{file.name}, {name if isinstance(name, str) else place}"
        if not readers:
            yield Bad(MALFORMED, label, f"none of the known entries ({place})", is_entry=True)
            continue
        is_known = True
        try:
            yield [note for read in readers for note in read(entry)]
        except BadRecordError as error:
            yield Bad(error.kind, label, f"{error} ({place})", is_entry=True)
    if first is not None and not is_known:
        keys = ", ".join(list(first)[:8]) if isinstance(first, dict) else str(first)[:40]
        raise InputError(
            f"{file}: not one known entry; the first has {keys}. Known are {KNOWN_ENTRIES}."
        )


class _PictureFinder:
    """Finds the pictures that a list names: in a folder, then among the members of tars."""

    def __init__(self, file: Path, images: Path | None, bad: list[Bad]) -> None:
        self._folder = file.parent if images is None else images
        tars = [self._folder] if images is not None else [file.parent / "images.tar"]
        if images is None and (year := COCO_YEAR.search(file.stem)):
            tars.append(file.parent / f"{year[0]}.tar")
        self._members: dict[str, Span] = {}
        for tar in tars:
            if not tar.is_file():
                continue
            members, problem = tar_members(tar)
            if problem and not members:
                raise InputError(
                    f"{tar}: {problem}. Pass --images a folder or an uncompressed tar."
                )
            if problem:
                bad.append(Bad(UNREADABLE, str(tar), problem))
            self._members |= members
        named = [tar.name for tar in tars if tar != self._folder]
        self.places = " or ".join([str(self._folder), *named])

    def find(self, names: tuple[str, ...]) -> Span | None:
        """Find a picture by the first of its names that is there.

        Of an absolute path that is elsewhere now, the longest known tail counts.
        """
        for name in names:
            path = PurePosixPath(name)
            tails = [name]
            if path.is_absolute():
                tails += ["/".join(path.parts[start:]) for start in range(1, len(path.parts))]
            for tail in tails:
                if _is_file(place := self._folder / tail):
                    return Span(str(place.resolve()))
                if span := self._members.get(str(PurePosixPath(tail))):
                    return span
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, as of a URL
        return False
