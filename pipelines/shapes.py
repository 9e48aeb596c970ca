"""The generated set `shapes`: pictures with captions, noise by choice, and exact ground truth.

Picture i of a seed is a pure function of (seed, i): it does not depend on how many are made.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import cv2

from pipelines.shapes_grammar import add_words, ask, compare, describe, state
from pipelines.shapes_scene import Dice, Scene, draw, throw_scene

# What the dice are thrown for; 0 is the scene. Noise has its own, so that it changes no picture.
WORDING, NOISE, TASKS = 1, 2, 3
# Wrong captions come from a picture at most this much further on.
MAX_STRAY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ShapesPicture:
    """One generated picture as a corpus row holds it; `annotations` is JSON."""

    image_id: str
    encoded: bytes
    captions: list[str]
    annotations: str


def shapes_id(seed: int, index: int) -> str:
    """Name a generated picture."""
    return f"shapes-{seed}:{index:07d}"


def true_captions(seed: int, index: int) -> list[str]:
    """Describe a picture without noise."""
    return describe(throw_scene(seed, index), Dice(seed, index, WORDING))


def shapes_picture(
    seed: int, index: int, *, wrong_captions: float = 0.0, extra_words: float = 0.0
) -> ShapesPicture:
    """Make picture `index` of the set `seed`.

    With probability `wrong_captions` all its captions are those of another picture; each caption
    has words of nothing that is seen with probability `extra_words`. The annotations say which.
    """
    scene = throw_scene(seed, index)
    captions = describe(scene, Dice(seed, index, WORDING))
    noise = Dice(seed, index, NOISE)
    # Both shares compare with the same throws: what a small share spoils, a larger one spoils too.
    is_wrong = noise.share() < wrong_captions
    given = _stray_captions(seed, index, captions, noise) if is_wrong else captions
    has_extra = [noise.share() < extra_words for _ in given]
    given = [
        add_words(text, noise) if extra else text
        for text, extra in zip(given, has_extra, strict=True)
    ]
    truth = {
        **_ground_truth(seed, index, scene),
        "captions": captions,
        "caption_is_wrong": is_wrong,
        "has_extra_words": has_extra,
    }
    is_written, encoded = cv2.imencode(".png", cv2.cvtColor(draw(scene), cv2.COLOR_RGB2BGR))
    assert is_written
    return ShapesPicture(
        image_id=shapes_id(seed, index),
        encoded=encoded.tobytes(),
        captions=given,
        annotations=json.dumps(truth),
    )


def _stray_captions(seed: int, index: int, captions: list[str], noise: Dice) -> list[str]:
    while True:
        other = index + 1 + int(noise.share() * MAX_STRAY)
        if set(stray := true_captions(seed, other)).isdisjoint(captions):
            return stray


def _ground_truth(seed: int, index: int, scene: Scene) -> dict[str, Any]:
    """Say all that tasks ask, and how the picture was made.

    A pair is the picture before, left, and this one, right; the first picture has none.
    """
    dice = Dice(seed, index, TASKS)
    truth: dict[str, Any] = {
        "objects": [
            {
                "box": thing.box,
                "expression": f"the {thing.size} {thing.name}",
                "category": thing.shape,
                "color": thing.color,
                "shape": thing.shape,
                "size": thing.size,
            }
            for thing in scene.things
        ],
        "background": scene.background,
        "spot": scene.spot or None,
        "relations": [asdict(relation) for relation in scene.relations],
        "questions": ask(scene, dice),
        "entailment": state(scene, dice),
    }
    if index:
        before = throw_scene(seed, index - 1)
        truth["pairs"] = [
            {"left": shapes_id(seed, index - 1), **statement}
            for statement in compare(before, scene, dice)
        ]
    return truth
