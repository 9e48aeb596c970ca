"""Files of `--annotations`: what belongs to the source's pictures, told apart by their content."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albef_core.errors import InputError
from pipelines.annotation_files import instance_objects, read_json
from pipelines.annotations import read_box
from pipelines.records import MALFORMED, NO_BOX, NOT_A_BOX, Bad

KNOWN_EXTRAS = (
    "VQA v2 answers; COCO instances; boxes of expressions {ref_id: [x, y, width, height]}; detector"
    " proposals {image_id: [[x, y, width, height], ...]} or a list of entries with `box` and"
    " `image_id`"
)


@dataclass
class Extras:
    """What the files hold, by the ids that they use, as texts; None: there is no such file."""

    answers: dict[str, Mapping[str, Any]] | None = None
    """VQA's annotations by question id."""
    objects: dict[str, list[dict[str, Any]]] | None = None
    """Boxes with categories by picture."""
    boxes: dict[str, Any] | None = None
    """Boxes of expressions by ref_id."""
    proposals: dict[str, list[Any]] | None = None
    """Detector boxes by picture."""
    bad: list[Bad] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Which of objects, boxes and proposals belonged to a picture."""

    def add_to(
        self, annotations: dict[str, list[Any]], *, names: Sequence[str], image_id: str
    ) -> list[Bad]:
        """Add to a picture's annotations what is here under any of its names."""
        bad: list[Bad] = []
        if found := _under(self.objects, names):
            annotations.setdefault("objects", []).extend(found)
            self.used.add("objects")
        if self.boxes is not None and "objects" in annotations:
            annotations["objects"] = list(self._boxed(annotations["objects"], image_id, bad))
        if found := _under(self.proposals, names):
            boxes = [(value, read_box(value)) for value in found]
            annotations["proposals"] = [box for _value, box in boxes if box]
            bad += [
                Bad(NOT_A_BOX, image_id, f"proposal {value}", is_entry=True)
                for value, box in boxes
                if not box
            ]
            self.used.add("proposals")
        return bad

    def _boxed(
        self, things: list[dict[str, Any]], image_id: str, bad: list[Bad]
    ) -> Iterator[dict[str, Any]]:
        """Give expressions their boxes; those that have none are left out, as no score has them."""
        assert self.boxes is not None
        for thing in things:
            if "expression" not in thing or "box" in thing:
                yield thing
            elif box := read_box(self.boxes.get(str(thing.get("id")))):
                self.used.add("boxes")
                yield {"box": box, **thing}
            else:
                detail = f"ref_id {thing.get('id')}: {thing['expression']}"
                bad.append(Bad(NO_BOX, image_id, detail, is_entry=True))

    def check_used(self, source: str) -> None:
        """Refuse files that belong to another source.

        Raises:
            InputError: nothing of one kind belonged to any picture.
        """
        for kind in ("objects", "boxes", "proposals"):
            if getattr(self, kind) is not None and kind not in self.used:
                raise InputError(
                    f"--annotations: its {kind} belong to no picture of {source}."
                    " Pass the file that goes with the source."
                )


def read_extras(files: Sequence[Path]) -> Extras:
    """Read all files of `--annotations`.

    Raises:
        InputError: one is not there, or none of `KNOWN_EXTRAS`.
    """
    extras = Extras()
    for file in files:
        body = read_json(file)
        kind = _kind(body)
        if kind is None:
            raise InputError(f"--annotations {file}: none of these: {KNOWN_EXTRAS}.")
        held = (getattr(extras, kind) or {}) | READERS[kind](file, body, extras.bad)
        setattr(extras, kind, held)
    return extras


def _under(table: Mapping[str, list[Any]] | None, names: Sequence[str]) -> list[Any]:
    return next((table[name] for name in names if name in table), []) if table else []


def _kind(body: Any) -> str | None:
    """Name the field of `Extras` that a file fills, by its first entry."""
    entries = body.get("annotations") if isinstance(body, dict) else body
    first = entries[0] if isinstance(entries, list) and entries else None
    if isinstance(first, dict):
        keys = {("question_id", "answers"): "answers", ("image_id", "bbox"): "objects"}
        keys = keys if isinstance(body, dict) else {("image_id", "box"): "proposals"}
        return next((kind for known, kind in keys.items() if first.keys() >= set(known)), None)
    value = next(iter(body.values()), None) if isinstance(body, dict) else None
    if read_box(value):
        return "boxes"
    return "proposals" if isinstance(value, list) and all(map(read_box, value)) else None


def _read_answers(file: Path, body: Any, bad: list[Bad]) -> dict[str, Any]:
    return {
        str(entry["question_id"]): entry
        for entry in _with_id(file, body["annotations"], "question_id", bad)
    }


def _read_objects(file: Path, body: Any, bad: list[Bad]) -> dict[str, Any]:
    objects: dict[str, list[dict[str, Any]]] = {}
    for found in instance_objects(body, where=file.name):
        if isinstance(found, Bad):
            bad.append(found)
        else:
            objects.setdefault(str(found[0]), []).append(found[1])
    return objects


def _read_boxes(_file: Path, body: Any, _bad: list[Bad]) -> dict[str, Any]:
    return body


def _read_proposals(file: Path, body: Any, bad: list[Bad]) -> dict[str, Any]:
    if isinstance(body, dict):
        return {name: boxes if isinstance(boxes, list) else [boxes] for name, boxes in body.items()}
    proposals: dict[str, list[Any]] = {}
    for entry in _with_id(file, body, "image_id", bad):
        proposals.setdefault(str(entry["image_id"]), []).append(entry.get("box"))
    return proposals


def _with_id(file: Path, entries: list[Any], key: str, bad: list[Bad]) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and isinstance(entry.get(key), int | str):
            yield entry
        else:
            bad.append(Bad(MALFORMED, f"{file.name}, entry {number}", f"no `{key}`", is_entry=True))


READERS: dict[str, Callable[[Path, Any, list[Bad]], dict[str, Any]]] = {
    "answers": _read_answers,
    "objects": _read_objects,
    "boxes": _read_boxes,
    "proposals": _read_proposals,
}
