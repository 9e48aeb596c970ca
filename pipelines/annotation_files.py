"""Published files that are one JSON object: Karpathy's splits, VQA v2 questions, COCO."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from albef_core.errors import InputError
from pipelines.annotation_entries import Note, optional, read_answers, read_text
from pipelines.annotations import read_box
from pipelines.records import (
    CROWD,
    MALFORMED,
    NO_ANSWER,
    NO_CAPTION,
    NO_QUESTION,
    NOT_A_BOX,
    SPLIT_NAME,
    Bad,
    BadRecordError,
)

COCO = "coco"
"""Source of every picture with a COCO number, so that it has one id in all of COCO's tasks."""
KNOWN_OBJECTS = (
    "Karpathy's splits (images with sentences), VQA v2 questions, COCO captions, COCO instances"
)

Read = Iterator[list[Note] | Bad]
"""For every entry of a file what it says, or what is wrong with it."""


def read_json(file: Path) -> Any:
    """Read a file of JSON.

    Raises:
        InputError: it is not there, or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file. Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not JSON ({error}). Fetch the file again.") from None


def read_object(
    file: Path, body: dict[str, Any], *, answers: Mapping[str, Mapping[str, Any]] | None
) -> Read:
    """Recognize the one object of a file and read it; `answers` are VQA's, by question id.

    Raises:
        InputError: it is none of `KNOWN_OBJECTS`, or questions whose answers are missing.
    """
    if isinstance(questions := body.get("questions"), list):
        subtype = str(body.get("data_subtype", ""))
        if answers is None and not subtype.startswith("test"):  # whose answers are not public
            raise InputError(
                f"{file}: VQA questions without answers. Pass the file of answers too:"
                " --annotations v2_mscoco_SPLIT_annotations.json."
            )
        return _read_vqa(file, subtype, questions, answers)
    images, first = body.get("images"), _first(body.get("images"))
    if isinstance(images, list) and "sentences" in first:
        return _read_karpathy(file, str(body.get("dataset") or ""), images)
    first = _first(body.get("annotations"))
    if isinstance(images, list) and "caption" in first:
        return _read_coco_captions(file, images, body["annotations"])
    if isinstance(images, list) and "bbox" in first:
        return _read_coco_instances(file, body)
    hint = ""
    if "answers" in first:
        hint = " These are VQA answers: pass the questions as --source, this as --annotations."
    raise InputError(
        f"{file}: the JSON is an object with {', '.join(list(body)[:5]) or 'nothing'}, not a list"
        f" of entries, nor one of: {KNOWN_OBJECTS}.{hint}"
    )


def instance_objects(
    body: dict[str, Any], *, where: str
) -> Iterator[tuple[int | str, dict[str, Any]] | Bad]:
    """Read COCO's instances: the number of the picture, and a box with its category."""
    categories = {one.get("id"): one.get("name") for one in _objects(body.get("categories"))}
    for number, entry in enumerate(body["annotations"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            yield Bad(MALFORMED, f"{where}, entry {number}", "no `image_id`", is_entry=True)
            continue
        name = f"{where}, object {entry.get('id', number)}"
        box = read_box(entry.get("bbox"))
        category = categories.get(entry.get("category_id"))
        if entry.get("iscrowd"):
            yield Bad(CROWD, name, "one box around many things", is_entry=True)
        elif box is None:
            yield Bad(NOT_A_BOX, name, f"`bbox` is {entry.get('bbox')}", is_entry=True)
        else:
            named = {"category": category} if isinstance(category, str) else {}
            yield entry["image_id"], {"box": box, **named, **optional(entry, id="id")}


def _first(values: Any) -> dict[str, Any]:
    return next(iter(_objects(values)), {})


def _objects(values: Any) -> Iterable[dict[str, Any]]:
    return (one for one in (values if isinstance(values, list) else []) if isinstance(one, dict))


def _read_karpathy(file: Path, dataset: str, images: list[Any]) -> Read:
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield Bad(MALFORMED, f"{file.name}, image {number}", "no `filename`", is_entry=True)
            continue
        name = image["filename"]
        given = [sentence.get("raw") for sentence in _objects(image.get("sentences"))]
        captions = [text for text in given if isinstance(text, str)]
        if not captions:
            yield Bad(NO_CAPTION, f"{file.name}, {name}", "no sentence with `raw`", is_entry=True)
            continue
        folder, split = image.get("filepath"), image.get("split")
        has_number = isinstance(image.get("cocoid"), int)
        yield [
            Note(
                pictures=(f"{folder}/{name}", name) if isinstance(folder, str) else (name,),
                key=str(image["cocoid"]) if has_number else Path(name).stem,
                source=COCO if has_number else dataset,
                split=split if isinstance(split, str) else None,
                captions=captions,
            )
        ]


def _read_vqa(
    file: Path, subtype: str, questions: list[Any], answers: Mapping[str, Mapping[str, Any]] | None
) -> Read:
    asked = set[str]()
    for number, entry in enumerate(questions):
        asked.add(question := str(entry.get("question_id") if isinstance(entry, dict) else ""))
        try:
            yield [_question(entry, subtype, answers)]
        except BadRecordError as error:
            label = f"{file.name}, question {question} (entry {number})"
            yield Bad(error.kind, label, str(error), is_entry=True)
    for question in (answers or {}).keys() - asked:
        detail = "the file of questions lacks it"
        yield Bad(NO_QUESTION, f"{file.name}, question {question}", detail, is_entry=True)


def _answered(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read one entry of the file of answers."""
    if entry is None:
        raise BadRecordError(NO_ANSWER, "the file of answers lacks it")
    given = [one.get("answer") for one in _objects(entry.get("answers"))]
    said = optional(entry, type="question_type", answer_type="answer_type")
    return {"answers": read_answers(given), **said}


def _question(entry: Any, subtype: str, answers: Mapping[str, Mapping[str, Any]] | None) -> Note:
    if not isinstance(entry, dict) or not isinstance(picture := entry.get("image_id"), int):
        raise BadRecordError(MALFORMED, "no `image_id`")
    none: dict[str, Any] = {"answers": []}
    answered = none if answers is None else _answered(answers.get(str(entry.get("question_id"))))
    folder = subtype.replace("test-dev", "test")  # a part of the questions on the same pictures
    name = f"COCO_{folder}_{picture:012d}.jpg"
    return Note(
        # Since 2017 the pictures have the number alone as their name.
        pictures=(name, f"{folder}/{name}", f"{picture:012d}.jpg"),
        key=str(picture),
        source=COCO,
        split=match[1] if (match := SPLIT_NAME.fullmatch(folder)) else None,
        kind="questions",
        value={
            "question": read_text(entry, "question"),
            **answered,
            **optional(entry, id="question_id"),
        },
    )


def _coco_pictures(file: Path, images: list[Any]) -> dict[int | str, Note]:
    """Read the table of pictures: by number, notes that say nothing so far."""
    year = re.search(r"(train|val|test)\d{4}", file.stem)
    return {
        image["id"]: Note(
            pictures=(name, f"{year[0]}/{name}") if year else (name,),
            key=str(image["id"]),
            source=COCO,
            url=url if isinstance(url := image.get("coco_url"), str) else None,
        )
        for image in _objects(images)
        if isinstance(image.get("id"), int | str)
        and isinstance(name := image.get("file_name"), str)
    }


def _read_coco_captions(file: Path, images: list[Any], entries: list[Any]) -> Read:
    pictures = _coco_pictures(file, images)
    # Pictures without a caption are to be missed by name.
    yield from ([note] for note in pictures.values())
    for number, entry in enumerate(entries):
        label = f"{file.name}, entry {number}"
        note = pictures.get(_image_id(entry))
        if note is None:
            detail = "its `image_id` is not among the images"
            yield Bad(MALFORMED, label, detail, is_entry=True)
        elif isinstance(caption := entry.get("caption"), str):
            yield [replace(note, captions=[caption])]
        else:
            yield Bad(NO_CAPTION, label, "no `caption`", is_entry=True)


def _image_id(entry: Any) -> int | str:
    found = entry.get("image_id") if isinstance(entry, dict) else None
    return found if isinstance(found, int | str) else ""


def _read_coco_instances(file: Path, body: dict[str, Any]) -> Read:
    pictures = _coco_pictures(file, body["images"])
    yield from ([note] for note in pictures.values())
    for found in instance_objects(body, where=file.name):
        if isinstance(found, Bad):
            yield found
        elif found[0] in pictures:
            yield [replace(pictures[found[0]], kind="objects", value=found[1])]
        else:
            detail = f"picture {found[0]} is not among the images"
            yield Bad(MALFORMED, f"{file.name}, object {found[1].get('id')}", detail, is_entry=True)
