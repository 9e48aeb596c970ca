"""Tars read by offset: where their members lie, and WebDatasets of pictures with captions."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines.records import (
    MALFORMED,
    MISSING,
    NO_CAPTION,
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

PICTURE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}


@dataclass(frozen=True, slots=True)
class TarRecord:
    """A picture of a WebDataset tar whose caption is a member of its own."""

    image_id: str
    split: str | None
    image: Span
    text: Span
    is_json: bool

    def load(self) -> Entry:
        """Read the picture and its caption."""
        text = self.text.read().decode("utf-8", errors="replace")
        if not self.is_json:
            return Entry(self.image.read(), [text.strip("\r\n")])
        try:
            captions, url = caption_fields(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadRecordError(MALFORMED, f"its .json is not JSON ({error})") from None
        return Entry(self.image.read(), captions, url)


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """A picture of a tar of jobs/pack.py: its .json has all that a corpus knows of it."""

    image_id: str
    split: str | None
    image: Span
    text: Span

    def load(self) -> Entry:
        """Read the picture and what is said of it."""
        told = json.loads(self.text.read())
        captions = told["captions"] and caption_fields({"caption": told["captions"]})[0]
        annotations = told.get("annotations")
        said = None if annotations is None else json.dumps(annotations)
        return Entry(self.image.read(), captions, told.get("url"), said)


def _packed(image: Span, text: Span) -> PackedRecord | None:
    """Read which picture of which corpus this is; None: the tar was not packed by us."""
    try:
        told = json.loads(text.read())
    except (ValueError, BadRecordError):
        return None
    if not isinstance(told, dict) or "captions" not in told:
        return None
    image_id = told.get("image_id")
    if not isinstance(image_id, str) or not image_id:
        return None
    return PackedRecord(image_id, told.get("split"), image, text)


def tar_members(tar: Path) -> tuple[dict[str, Span], str]:
    """Find where the files in a tar lie, without reading them; the text says what is damaged."""
    members: dict[str, Span] = {}
    path = str(tar.resolve())
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isreg():
                    name = str(PurePosixPath(member.name))
                    members[name] = Span(path, member.offset_data, member.size)
            end = Span(path, archive.offset, 512).read()
    except tarfile.TarError as error:
        return members, f"not a tar, or cut short or compressed ({error})"
    except BadRecordError:
        return members, ""  # It lacks the two zero blocks of the end, as streams do.
    # The library takes a damaged header for the end.
    return members, "damaged in the middle, the rest is lost" if end.strip(b"\0") else ""


def list_tars(files: list[Path]) -> Listing:
    """List WebDataset tars: members of one name up to the first dot are one record.

    Pictures of jobs/pack.py keep the image ids that they had.
    """
    listing = Listing()
    for file in files:
        source, split = source_and_split(file)
        members, problem = tar_members(file)
        if problem:
            listing.bad.append(Bad(UNREADABLE, str(file), problem))
        samples: dict[str, dict[str, Span]] = {}
        for name, span in members.items():
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if stem:
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {})[suffix.lower()] = span
        for key, parts in samples.items():
            image_id = f"{source}:{file.stem}/{key}"
            image = next((parts[suffix] for suffix in parts if suffix in PICTURE_SUFFIXES), None)
            text = parts.get("txt") or parts.get("json")
            packed = _packed(image, parts["json"]) if image and "json" in parts else None
            if packed:
                listing.records.append(packed)
            elif image and text:
                is_json = "txt" not in parts
                listing.records.append(TarRecord(image_id, split, image, text, is_json))
            elif image:
                listing.bad.append(Bad(NO_CAPTION, image_id, "no .txt or .json"))
            elif text:
                listing.bad.append(Bad(MISSING, image_id, "no picture beside the caption"))
    return without_duplicates(listing)
