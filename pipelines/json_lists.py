"""ALBEF's annotation files: JSON lists of captions, with the pictures in a folder or a tar."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from albef_core.errors import InputError
from pipelines.records import (
    MALFORMED,
    MISSING,
    UNREADABLE,
    Bad,
    BadRecordError,
    Entry,
    Listing,
    Span,
    caption_fields,
    source_and_split,
    without_duplicates,
)
from pipelines.tars import tar_members


@dataclass(frozen=True, slots=True)
class ListedRecord:
    """A picture whose captions a JSON list holds."""

    image_id: str
    split: str | None
    image: Span
    captions: tuple[str, ...]
    url: str | None

    def load(self) -> Entry:
        """Read the picture."""
        return Entry(self.image.read(), list(self.captions), self.url)


def list_json(files: list[Path], images: Path | None) -> Listing:
    """List ALBEF's annotation files: entries of the same picture become one record."""
    if images is not None and not images.exists():
        raise InputError(f"--images {images}: no such folder or tar.")
    listing = Listing()
    for file in files:
        source, split = source_and_split(file)
        finder = _PictureFinder(file, images, listing.bad)
        groups = _group_entries(file, _read_list(file), listing.bad)
        for name, entries in groups.items():
            captions = [text for entry in entries for text in entry[1]]
            key = next((key for key, _captions, _url in entries if key), name)
            url = next((url for _key, _captions, url in entries if url), None)
            place = finder.find(name)
            image_id = f"{source}:{key}"
            if place is None:
                listing.bad.append(Bad(MISSING, image_id, f"{name} is not in {finder.places}"))
            else:
                record = ListedRecord(image_id, split, place, tuple(captions), url)
                listing.records.append(record)
    return without_duplicates(listing)


def _read_list(file: Path) -> list[Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: not JSON ({error}). Expected is a list of entries with `image` and `caption`."
        ) from None
    if isinstance(entries, list):
        return entries
    found = (
        f"an object with {', '.join(list(entries)[:5])}" if isinstance(entries, dict) else "a value"
    )
    raise InputError(
        f"{file}: the JSON is {found}, not a list of entries with `image` and `caption`."
    )


def _group_entries(
    file: Path, entries: list[Any], bad: list[Bad]
) -> dict[str, list[tuple[str, list[str], str | None]]]:
    """Group (key, captions, url) of the usable entries by picture, in the list's order."""
    groups: dict[str, list[tuple[str, list[str], str | None]]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            bad.append(Bad(MALFORMED, f"{file.name}, entry {number}", "no `image`"))
            continue
        name = entry["image"]
        try:
            captions, url = caption_fields(entry)
        except BadRecordError as error:
            bad.append(Bad(error.kind, f"{file.name}, {name}", str(error)))
            continue
        key = entry.get("image_id")
        groups.setdefault(name, []).append(("" if key is None else str(key), captions, url))
    return groups


class _PictureFinder:
    """Finds the pictures that a JSON list names: in a folder, then among the members of a tar."""

    def __init__(self, file: Path, images: Path | None, bad: list[Bad]) -> None:
        tar = file.parent / "images.tar" if images is None else images
        self._folder = file.parent if images is None else images
        self._members: dict[str, Span] = {}
        if tar.is_file():
            self._members, problem = tar_members(tar)
            if problem and not self._members:
                raise InputError(
                    f"{tar}: {problem}. Pass --images a folder or an uncompressed tar."
                )
            if problem:
                bad.append(Bad(UNREADABLE, str(tar), problem))
        self.places = f"{self._folder} or {tar.name}" if tar != self._folder else str(tar)

    def find(self, name: str) -> Span | None:
        """Find a picture; of an absolute path that is elsewhere now, by its longest known tail."""
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
