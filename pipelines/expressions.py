"""The expressions of a corpus that have a box: what evaluation of grounding looks for."""

import json
from collections import Counter
from dataclasses import dataclass

from albef_core.captions import clean_caption
from albef_core.errors import InputError
from pipelines.annotations import Annotations, Box
from pipelines.manifest import Manifest, read_rows


@dataclass(frozen=True, kw_only=True)
class Expression:
    """What is looked for in one picture, and where it is."""

    row: int
    """Of the corpus."""
    image_id: str
    text: str
    box: Box
    proposals: list[Box]
    """A detector's boxes of the picture, each with an area; may be none."""


def collect_expressions(
    manifest: Manifest, *, max_words: int
) -> tuple[list[Expression], dict[str, int]]:
    """Find all expressions with a box, in the order of the corpus's rows, and count what is none.

    Raises:
        InputError: there is none.
    """
    bad: Counter[str] = Counter()
    expressions: list[Expression] = []
    for row, (image_id, text) in enumerate(read_rows(manifest, ["image_id", "annotations"])):
        annotations: Annotations = json.loads(text or "{}") or {}
        expressions += _expressions_of(annotations, row, image_id, max_words, bad)
    if not expressions:
        said = "".join(f", {number} with {kind}" for kind, number in bad.items())
        raise InputError(
            f"{manifest.folder}: none of its {manifest.num_images} pictures has an expression with"
            f" a box{said}. Ingest a data set of grounding."
        )
    return expressions, dict(bad)


def _expressions_of(
    annotations: Annotations, row: int, image_id: str, max_words: int, bad: Counter[str]
) -> list[Expression]:
    found: list[Expression] = []
    things = [t for t in annotations.get("objects") or [] if t.get("expression") is not None]
    proposals = []
    for box in annotations.get("proposals") or [] if things else []:
        if _has_area(box):
            proposals.append(box)
        else:
            bad["a proposal without area"] += 1
    for thing in things:
        text, box = thing.get("expression", ""), thing.get("box")
        if not clean_caption(text, max_words=max_words):
            bad["an empty expression"] += 1
        elif box is None:
            bad["no box"] += 1
        elif not _has_area(box) or not _has_pixel(box):
            bad["a box without a pixel"] += 1
        else:
            found.append(
                Expression(row=row, image_id=image_id, text=text, box=box, proposals=proposals)
            )
    return found


def _has_area(box: Box) -> bool:
    return box[2] > 0 and box[3] > 0


def _has_pixel(box: Box) -> bool:
    left, top, width, height = box
    return int(left + width) > max(0, int(left)) and int(top + height) > max(0, int(top))
