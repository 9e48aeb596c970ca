"""Entries of published lists: a caption, question, statement, pair or expression in each.

The lists of ALBEF, and the lines of SNLI-VE and NLVR2. An entry is recognized by its keys, so
entries of different kinds may stand in one list.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from albef_core.tasks.labels import ENTAILMENT_LABELS
from pipelines.annotations import read_box
from pipelines.records import (
    EMPTY_TEXT,
    MALFORMED,
    NO_ANSWER,
    NO_GOLD_LABEL,
    NOT_A_BOX,
    UNKNOWN_LABEL,
    BadRecordError,
    caption_fields,
    clean_unicode,
)

KNOWN_ENTRIES = (
    "image and caption; image, question and answer; image, sentence and label; images, sentence"
    " and label; image and text (RefCOCO+); Flickr30K_ID, sentence2 and gold_label (SNLI-VE);"
    " identifier, sentence and label (NLVR2)"
)
NO_GOLD = "-"
"""SNLI's label where the annotators did not agree."""
TRUTH = {"True": True, "False": False, "true": True, "false": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one entry says of one picture."""

    pictures: tuple[str, ...]
    """Names under which the picture may be found; the first one identifies it in its list."""
    key: str = ""
    """Second part of the image id; default: the first name."""
    source: str = ""
    """First part of the image id; default: from the name of the list."""
    split: str | None = None
    """Default: from the name of the list."""
    url: str | None = None
    captions: list[str] = field(default_factory=list)
    kind: str = ""
    """Key of `Annotations` that `value` belongs to; empty: there is none."""
    value: dict[str, Any] = field(default_factory=dict)
    """In pairs `left` is the first name of the left picture, in place of its image id."""
    is_left: bool = False
    """The picture is a pair's left one, of which nothing needs to be said."""


Reader = Callable[[dict[str, Any]], list[Note]]


def entry_readers(entry: Any) -> list[Reader]:
    """Recognize an entry by its keys; no reader fits what is none of `KNOWN_ENTRIES`."""
    if not isinstance(entry, dict):
        return []
    if "sentence" in entry and "images" in entry:
        return [_read_pair]
    if "sentence" in entry and "identifier" in entry:
        return [_read_nlvr2]
    if "Flickr30K_ID" in entry and "sentence2" in entry:
        return [_read_snli_ve]
    if "image" not in entry:
        return []
    return [reader for key, reader in BY_KEY.items() if key in entry] or [_read_caption]


def read_text(entry: Mapping[str, Any], key: str) -> str:
    """Take a text out of an entry.

    Raises:
        BadRecordError: it is none, or empty.
    """
    text = entry.get(key)
    if not isinstance(text, str):
        raise BadRecordError(MALFORMED, f"`{key}` is no text")
    if not text.strip():
        raise BadRecordError(EMPTY_TEXT, f"`{key}` is empty")
    return clean_unicode(text)


def read_answers(answers: Any) -> list[str]:
    """Take the answers of all annotators, repeats kept, empty ones left out.

    Raises:
        BadRecordError: none is left, or they are no texts.
    """
    answers = [answers] if isinstance(answers, str) else answers
    if answers is None:
        raise BadRecordError(NO_ANSWER, "no `answer`")
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise BadRecordError(MALFORMED, "`answer` is neither a text nor a list of texts")
    kept = [clean_unicode(text) for text in answers if text.strip()]
    if not kept:
        raise BadRecordError(NO_ANSWER, "all answers are empty")
    return kept


def optional(entry: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Take ids and types that an entry may have: `optional(entry, id="question_id")`."""
    found = {name: entry.get(key) for name, key in names.items()}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | str) and not isinstance(value, bool)
    }


def _picture(entry: dict[str, Any]) -> dict[str, Any]:
    name, key = entry["image"], entry.get("image_id")
    if not isinstance(name, str) or not name:
        raise BadRecordError(MALFORMED, "`image` is no name of a picture")
    return {"pictures": _with_suffix(name), "key": "" if key is None else str(key)}


def _with_suffix(name: str) -> tuple[str, ...]:
    # ALBEF's list of SNLI-VE and SNLI-VE itself leave `.jpg` out.
    return (name, f"{name}.jpg") if re.fullmatch(r".*/?\d+", name) else (name,)


def _read_caption(entry: dict[str, Any]) -> list[Note]:
    picture = _picture(entry)
    captions, url = caption_fields(entry)
    return [Note(**picture, captions=captions, url=url)]


def _read_question(entry: dict[str, Any]) -> list[Note]:
    said = optional(
        entry,
        id="question_id",
        type="question_type",
        answer_type="answer_type",
        dataset="dataset",
    )
    # A question of a test split, whose answers only a server has: it knows the question by its id.
    is_open = "answer" not in entry and "id" in said
    value = {
        "question": read_text(entry, "question"),
        "answers": [] if is_open else read_answers(entry.get("answer")),
        **said,
    }
    return [Note(**_picture(entry), kind="questions", value=value)]


def _read_statement(entry: dict[str, Any]) -> list[Note]:
    value = {
        "sentence": read_text(entry, "sentence"),
        "label": _entailment_label(entry.get("label")),
        **optional(entry, id="pairID"),
    }
    return [Note(**_picture(entry), kind="entailment", value=value)]


def _read_expression(entry: dict[str, Any]) -> list[Note]:
    value = {"expression": read_text(entry, "text"), **optional(entry, id="ref_id")}
    given = entry.get("box", entry.get("bbox"))
    if given is not None:
        box = read_box(given)
        if box is None:
            raise BadRecordError(NOT_A_BOX, f"{given} is no [x, y, width, height]")
        value = {"box": box, **value}
    return [Note(**_picture(entry), kind="objects", value=value)]


def _read_pair(entry: dict[str, Any]) -> list[Note]:
    names = entry["images"]
    if (
        not isinstance(names, list)
        or len(names) != 2
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise BadRecordError(MALFORMED, "`images` are not the names of two pictures")
    value = _pair_value(entry, left=names[0])
    return [
        Note(pictures=(names[0],), is_left=True),
        Note(pictures=(names[1],), kind="pairs", value=value),
    ]


def _read_nlvr2(entry: dict[str, Any]) -> list[Note]:
    """`dev-850-0-1` is sentence 1 on `dev-850-0-img0.png` and `dev-850-0-img1.png`."""
    stem, _, sentence = str(entry["identifier"]).rpartition("-")
    if not stem or not sentence.isdigit():
        raise BadRecordError(MALFORMED, "`identifier` is not SPLIT-SET-PAIR-SENTENCE")
    split = stem.split("-")[0]
    # The official download has folders of the train set by number.
    folders = [split, f"images/{split}"]
    if isinstance(entry.get("directory"), int | str):
        folders = [f"{folder}/{entry['directory']}" for folder in ("train", "images/train")]
    left, right = (
        {
            "pictures": (name, *(f"{folder}/{name}" for folder in folders)),
            "key": name.removesuffix(".png"),
            "source": "nlvr2",
            "split": split,
            "url": url if isinstance(url := entry.get(f"{side}_url"), str) else None,
        }
        for side, name in (("left", f"{stem}-img0.png"), ("right", f"{stem}-img1.png"))
    )
    value = _pair_value(entry, left=left["pictures"][0])
    return [Note(**left, is_left=True), Note(**right, kind="pairs", value=value)]


def _pair_value(entry: dict[str, Any], *, left: str) -> dict[str, Any]:
    label = entry.get("label")
    truth = label if isinstance(label, bool) else TRUTH.get(str(label))
    if truth is None:
        raise BadRecordError(UNKNOWN_LABEL, f"{label!r} is neither True nor False")
    sentence = read_text(entry, "sentence")
    return {"left": left, "sentence": sentence, "label": truth, **optional(entry, id="identifier")}


def _read_snli_ve(entry: dict[str, Any]) -> list[Note]:
    name = str(entry["Flickr30K_ID"]).removesuffix(".jpg")
    value = {
        "sentence": read_text(entry, "sentence2"),
        "label": _entailment_label(entry.get("gold_label")),
        **optional(entry, id="pairID"),
    }
    picture = {"pictures": (f"{name}.jpg",), "key": name, "source": "flickr30k"}
    return [Note(**picture, kind="entailment", value=value)]


def _entailment_label(label: Any) -> str:
    if label == NO_GOLD:
        raise BadRecordError(NO_GOLD_LABEL, "the annotators did not agree")
    if label not in ENTAILMENT_LABELS:
        raise BadRecordError(UNKNOWN_LABEL, f"{label!r} is none of {', '.join(ENTAILMENT_LABELS)}")
    return label


BY_KEY: dict[str, Reader] = {
    "caption": _read_caption,
    "question": _read_question,
    "sentence": _read_statement,
    "text": _read_expression,
}
"""Kinds of entries on one `image`, each by a key of its own; an entry may be of several."""
