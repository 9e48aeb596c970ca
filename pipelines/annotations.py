"""The column `annotations`: what tasks ask about a picture, as JSON; boxes checked, all counted."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NotRequired, TypedDict

from pipelines.records import CLIPPED, OUTSIDE, Bad

Box = list[float]
"""Left, top, width, height in pixels."""

# Published boxes are rounded to hundredths; sums of floats stick out by less.
TOLERANCE_PX = 0.01
SHOWN = 4


class Question(TypedDict):
    """A question and what each annotator answered, repeats kept; none where that is not public."""

    question: str
    answers: list[str]
    id: NotRequired[int | str]
    type: NotRequired[str]
    answer_type: NotRequired[str]
    dataset: NotRequired[str]


class Statement(TypedDict):
    """A sentence that follows from the picture, contradicts it, or neither."""

    sentence: str
    label: Literal["entailment", "neutral", "contradiction"]
    id: NotRequired[int | str]


class PairStatement(TypedDict):
    """A sentence on two pictures, true or false; it stands with the right one."""

    left: str
    sentence: str
    label: bool
    id: NotRequired[int | str]


# `box` is absent where an expression is for training alone, as in ALBEF's RefCOCO+ lists.
class Thing(TypedDict, total=False):
    """Something in the picture: where it is, what it is called."""

    box: Box
    expression: str
    category: str
    id: int | str


class Annotations(TypedDict, total=False):
    """What is said of one picture beside captions; keys that do not apply are absent."""

    questions: list[Question]
    entailment: list[Statement]
    pairs: list[PairStatement]
    objects: list[Thing]
    proposals: list[Box]


def read_box(value: Any) -> Box | None:
    """Take the first four of a list of numbers as a box; None if they are none.

    Detectors write scores behind the four.
    """
    if not isinstance(value, list) or len(value) < 4:
        return None
    box = value[:4]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in box):
        return None
    # Neither NaN nor without area: comparisons with NaN are false.
    return box if box[2] > 0 and box[3] > 0 and abs(box[0]) + abs(box[1]) < 1e9 else None


def clip_boxes(annotations: Annotations, *, width: int, height: int, name: str) -> list[Bad]:
    """Clip boxes to the picture, in place; those wholly outside go. Both are told of."""
    bad: list[Bad] = []

    def clipped(box: Box, what: str) -> Box | None:
        x, y, box_width, box_height = box
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + box_width, width), min(y + box_height, height)
        if right <= left or bottom <= top:
            detail = f"{what} {box} of a picture of {width} x {height}"
            bad.append(Bad(OUTSIDE, name, detail, is_entry=True))
            return None
        cut = max(left - x, top - y, x + box_width - right, y + box_height - bottom)
        if cut <= TOLERANCE_PX:
            return box
        bad.append(Bad(CLIPPED, name, f"{what} {box} by {cut:.2f} pixels", is_entry=True))
        return [left, top, right - left, bottom - top]

    things: list[Thing] = []
    for thing in annotations.get("objects", []):
        if "box" not in thing:
            things.append(thing)
        elif box := clipped(thing["box"], f"object {thing.get('id', '')}".rstrip()):
            things.append({**thing, "box": box})
    if "objects" in annotations:
        annotations["objects"] = things
    if "proposals" in annotations:
        boxes = [clipped(box, "proposal") for box in annotations["proposals"]]
        annotations["proposals"] = [box for box in boxes if box]
    return bad


def count_annotations(annotations: Annotations) -> Counter[str]:
    """Count what a report tells; what does not occur is absent."""
    questions, things = annotations.get("questions", []), annotations.get("objects", [])
    return +Counter(
        {
            "questions": len(questions),
            "answers": sum(len(question["answers"]) for question in questions),
            "statements": len(annotations.get("entailment", [])),
            "pairs": len(annotations.get("pairs", [])),
            "boxes": sum("box" in thing for thing in things),
            "expressions": sum("expression" in thing for thing in things),
            "proposals": len(annotations.get("proposals", [])),
        }
    )


def show_annotations(annotations: Annotations) -> list[str]:
    """Write the first of each kind as lines to read."""
    return list(_lines(annotations))


def _lines(annotations: Annotations) -> Iterator[str]:
    for question in annotations.get("questions", [])[:SHOWN]:
        yield f"{question['question']} {', '.join(dict.fromkeys(question['answers']))}"
    for statement in annotations.get("entailment", [])[:SHOWN]:
        yield f"{statement['label']}: {statement['sentence']}"
    for pair in annotations.get("pairs", [])[:SHOWN]:
        yield f"with {pair['left']}: {pair['sentence']} ({str(pair['label']).lower()})"
    for thing in annotations.get("objects", [])[:SHOWN]:
        where = f" at {thing['box']}" if "box" in thing else ""
        yield f"{thing.get('expression') or thing.get('category', 'object')}{where}"
