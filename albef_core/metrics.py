"""Metrics of retrieval, detection, grounding and VQA, with chance and intervals. Plain numpy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

RECALLS_AT = (1, 5, 10)
COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One metric with its uncertainty; all four numbers are shares between 0 and 1."""

    value: float
    """As measured."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    chance: float
    """What a model without any knowledge is expected to reach."""


def image_to_text_ranks(
    scores: Float[np.ndarray, "I T"], image_of_text: Int[np.ndarray, " T"]
) -> Int[np.ndarray, " I"]:
    """Rank, for each image, the best of its own texts among all texts; 0 is first.

    A tie counts against us: the rank is the number of foreign texts that do not score strictly
    lower, so that a constant model comes last and a NaN never wins. Ties between own texts cost
    nothing. Each image needs a text of its own.
    """
    own = image_of_text == np.arange(len(scores))[:, None]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    return (~(scores < best) & ~own).sum(axis=1)


def text_to_image_ranks(
    scores: Float[np.ndarray, "I T"], image_of_text: Int[np.ndarray, " T"]
) -> Int[np.ndarray, " T"]:
    """Rank, for each text, its image among all images; 0 is first, and a tie counts against us."""
    own = scores[image_of_text, np.arange(len(image_of_text))]
    return (~(scores < own)).sum(axis=0) - 1


def hit_chance(num_candidates: int, num_right: int, k: int) -> float:
    """Give the chance that k blind draws hold a right candidate: 1 - C(N-m, k) / C(N, k)."""
    missed = 1.0
    for drawn in range(min(k, num_candidates)):
        missed *= max(0, num_candidates - num_right - drawn) / (num_candidates - drawn)
    return 1 - missed


def retrieval_metrics(
    image_to_text: Float[np.ndarray, "I T"],
    text_to_image: Float[np.ndarray, "I T"],
    image_of_text: Int[np.ndarray, " T"],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Measure recall at 1, 5 and 10 both ways, and `mean_recall`, the mean of the six.

    `tr_r5` is text retrieval (the query is an image), `ir_r5` image retrieval (the query is a
    text). The two score matrices are the same one unless each direction re-ranked candidates of its
    own; a row is an image in both. Intervals are bootstrap percentiles over queries: photographs
    are drawn with replacement, each with all of its captions, while the candidates stay as they
    are.
    """
    num_images, num_texts = image_to_text.shape
    texts_of_image = np.bincount(image_of_text, minlength=num_images)
    assert texts_of_image.min() > 0, "every image needs a text: it could be no query of tr_r1"
    found_text = _hits(image_to_text_ranks(image_to_text, image_of_text))
    found_image = np.zeros((num_images, len(RECALLS_AT)))
    np.add.at(found_image, image_of_text, _hits(text_to_image_ranks(text_to_image, image_of_text)))

    def recalls(times_drawn: Int[np.ndarray, "R I"]) -> Float[np.ndarray, "R 7"]:
        tr = times_drawn @ found_text / num_images
        ir = times_drawn @ found_image / (times_drawn @ texts_of_image)[:, None]
        return np.column_stack([tr, ir, np.hstack([tr, ir]).mean(axis=1)])

    measured = recalls(np.ones((1, num_images), dtype=np.int64))[0]
    tail = (1 - COVERAGE) / 2
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)
    low, high = np.quantile(recalls(drawn), [tail, 1 - tail], axis=0)
    by_image = [[hit_chance(num_texts, int(m), k) for k in RECALLS_AT] for m in texts_of_image]
    tr_chance = np.mean(by_image, axis=0)
    ir_chance = np.array([hit_chance(num_images, 1, k) for k in RECALLS_AT])
    chance = np.hstack([tr_chance, ir_chance, np.hstack([tr_chance, ir_chance]).mean()])
    names = [f"{way}_r{k}" for way in ("tr", "ir") for k in RECALLS_AT] + ["mean_recall"]
    return {
        name: Estimate(value=float(v), low=float(a), high=float(b), chance=float(c))
        for name, v, a, b, c in zip(names, measured, low, high, chance, strict=True)
    }


def _hits(ranks: Int[np.ndarray, " N"]) -> Bool[np.ndarray, "N K"]:
    return ranks[:, None] < np.array(RECALLS_AT)


def mean_estimate(
    values: Float[np.ndarray, " N"],
    chances: Float[np.ndarray, " N"],
    image_of_row: Int[np.ndarray, " N"],
    *,
    num_resamples: int,
    seed: int,
) -> Estimate:
    """Average a share over rows; `chances` are what a blind guess would reach in each.

    The interval is a bootstrap percentile over pictures: each is drawn with all of its rows.
    """
    _, image_of_row = np.unique(image_of_row, return_inverse=True)
    total, count = np.bincount(image_of_row, weights=values), np.bincount(image_of_row)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=num_resamples)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(drawn @ total / (drawn @ count), [tail, 1 - tail])
    value, chance = float(np.mean(values)), float(np.mean(chances))
    return Estimate(value=value, low=float(low), high=float(high), chance=chance)


def auc(scores: Float[np.ndarray, " N"], is_positive: Bool[np.ndarray, " N"]) -> float:
    """Give the area under the ROC curve: how often a positive row scores above a negative one.

    A tie counts one half. There must be rows of both kinds, and no score may be NaN.
    """
    _, place = np.unique(scores, return_inverse=True)
    return _area(place, is_positive, np.ones(len(scores)))


def auc_estimate(
    scores: Float[np.ndarray, " N"],
    is_positive: Bool[np.ndarray, " N"],
    image_of_row: Int[np.ndarray, " N"],
    *,
    num_resamples: int,
    seed: int,
) -> Estimate:
    """Measure the area under the ROC curve as `auc` does, with an interval.

    That is a bootstrap percentile over pictures: each is drawn with all of its rows. Resamples in
    which one of the kinds does not occur have no area and are left out.
    """
    _, place = np.unique(scores, return_inverse=True)
    _, image_of_row = np.unique(image_of_row, return_inverse=True)
    num_images = int(image_of_row.max()) + 1
    rng = np.random.default_rng(seed)
    even = np.full(num_images, 1 / num_images)
    areas = [
        # One resample at a time: rows may be millions.
        _area(place, is_positive, rng.multinomial(num_images, even)[image_of_row].astype(float))
        for _ in range(num_resamples)
    ]
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(areas, [tail, 1 - tail])
    return Estimate(value=auc(scores, is_positive), low=float(low), high=float(high), chance=0.5)


def _area(
    place: Int[np.ndarray, " N"],
    is_positive: Bool[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
) -> float:
    """Give the area under the ROC curve of rows that count several times or not at all."""
    positive = np.bincount(place, weights * is_positive)
    negative = np.bincount(place, weights * ~is_positive)
    below = np.cumsum(negative) - negative
    num_pairs = positive.sum() * negative.sum()
    return float(positive @ (below + negative / 2) / num_pairs) if num_pairs else float("nan")


RIGHT_IOU = 0.5
"""A chosen box is right from this overlap on."""


def box_scores(
    heat: Float[np.ndarray, "Y X"], boxes: Float[np.ndarray, "N 4"], *, area_power: float = 0.5
) -> Float[np.ndarray, " N"]:
    """Score proposed boxes by the heat inside, as the published evaluation of RefCOCO+ does.

    The sum over the pixels, corners cut to integers, is divided by the box's area to the power
    `area_power`, so that neither the largest nor the smallest box always wins: the best is the
    highest, the first of equals. `heat` has the picture's size; boxes are left, top, width and
    height in pixels.
    """
    sums = [heat[_pixels(box)].sum() for box in boxes]
    return np.array(sums) / (boxes[:, 2] * boxes[:, 3]) ** area_power


def box_overlap(
    box: Float[np.ndarray, "4"], others: Float[np.ndarray, "N 4"]
) -> Float[np.ndarray, " N"]:
    """Give the intersection over union of a box with others, as the published evaluation does.

    Boxes are left, top, width and height. The last pixel counts as inside in the intersection
    alone, so that boxes that share one row of pixels do not overlap.
    """
    start = np.maximum(box[:2], others[:, :2])
    last = np.minimum(box[:2] + box[2:] - 1, others[:, :2] + others[:, 2:] - 1)
    overlaps = (start < last).all(axis=1)
    shared = np.where(overlaps, (last - start + 1).prod(axis=1), 0.0)
    return shared / (box[2:].prod() + others[:, 2:].prod(axis=1) - shared)


def inside_boxes(
    boxes: Float[np.ndarray, "N 4"], *, height: int, width: int
) -> Bool[np.ndarray, "{height} {width}"]:
    """Mark the pixels of a picture that lie in any of the boxes: left, top, width and height.

    The mean of it is the chance level of `points_inside` and `energy_inside`.
    """
    inside = np.zeros((height, width), dtype=bool)
    for box in boxes:
        inside[_pixels(box)] = True
    return inside


def points_inside(heat: Float[np.ndarray, "Y X"], inside: Bool[np.ndarray, "Y X"]) -> bool:
    """Play the pointing game: tell whether the hottest pixel lies inside.

    A tie counts against us: every pixel that is not strictly cooler must lie inside, so that a
    constant map or NaN never wins.
    """
    return bool(inside[~(heat < heat.max())].all())


def energy_inside(heat: Float[np.ndarray, "Y X"], inside: Bool[np.ndarray, "Y X"]) -> float:
    """Give the share of a map's heat that lies inside, 0 to 1; 0 where there is no heat.

    Below zero, where bicubic resizing dips, there is none.
    """
    heat = np.maximum(heat, 0)
    total = heat.sum()
    return float(heat[inside].sum() / total) if total > 0 else 0.0


def _pixels(box: Float[np.ndarray, "4"]) -> tuple[slice, slice]:
    """Cut the corners to integers; what hangs out of the picture's left or top is left out."""
    left, top, right, bottom = (max(0, int(x)) for x in (*box[:2], *(box[:2] + box[2:])))
    return slice(top, bottom), slice(left, right)


NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
# Not those that without the apostrophe are words of their own, such as "hell" and "its".
_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
    needn't shouldn't wasn't weren't won't wouldn't could've might've must've should've they've
    we've would've you've i've i'm they'd you'd he'd it'd that'd who'd they'll you'll it'll that'll
    who'll they're you're he's she's that's there's what's where's who's how's someone's somebody's
    something's everyone's ma'am o'clock y'all
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}


def normalize_answer(answer: str) -> str:
    """Write an answer as the VQA v2 evaluation compares it (visualqa.org/evaluation.html).

    Lower case; no periods but decimal points; no comma inside a number; other punctuation, apart
    from apostrophe and colon, becomes a space; number words up to ten become digits; articles go;
    contractions get a missing apostrophe back.
    """
    text = re.sub(r"\.(?!\d)|(?<=\d),(?=\d)", "", answer.lower())
    text = re.sub(r"[^\w\s.':]|_", " ", text)
    words = (NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracies(
    answers: Sequence[str], annotations: Sequence[Sequence[str]]
) -> Float[np.ndarray, " N"]:
    """Score answers against those of each question's annotators, as VQA v2 does; 0 to 1.

    Three annotators who said the same make an answer right, two make it two thirds right; that is
    averaged over leaving out each annotator in turn. Made for ten annotators: with fewer than four,
    not even their own answer is wholly right.
    """
    scores = []
    for answer, given in zip(answers, annotations, strict=True):
        said = normalize_answer(answer)
        same = [said == normalize_answer(other) for other in given]
        scores.append(np.mean([min((sum(same) - own) / 3, 1) for own in same]))
    return np.array(scores)


def exact_matches(answers: Sequence[str], truths: Sequence[str]) -> Bool[np.ndarray, " N"]:
    """Say which answers out of a closed list are the right ones, letter by letter."""
    return np.array([a == b for a, b in zip(answers, truths, strict=True)], dtype=bool)
