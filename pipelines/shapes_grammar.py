"""What is said about generated pictures: captions, questions, entailment, statements on pairs."""

from collections.abc import Callable
from typing import Any

from pipelines.shapes_scene import BACKGROUNDS, COLORS, OUTLINES, Dice, Scene, Thing

SIZES = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "within"),
    "around": ("around", "surrounding"),
}
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
}
NUMBERS = ("no", "one", "two", "three", "four")
EXTRA_WORDS = (
    "stock photo",
    "free download",
    "hd wallpaper",
    "for sale",
    "best price 2019",
    "img 4032",
    "photo by anna",
    "click here",
    "happy birthday",
    "free shipping worldwide",
    "vintage poster",
    "how to learn english",
    "summer sale",
    "world news today",
)
CAPTIONS_PER_PICTURE = 3


def describe(scene: Scene, dice: Dice) -> list[str]:
    """Write the captions: terse as alt texts, each with every color, shape and relation."""
    forms = _forms_of_one if len(scene.things) == 1 else _forms_of_several
    return dice.deal(forms(scene, dice), CAPTIONS_PER_PICTURE)


def _forms_of_one(scene: Scene, dice: Dice) -> list[str]:
    thing = scene.things[0]
    full, background = _sized(thing, dice), scene.background
    return [
        f"{full} {scene.spot} on {background} background",
        f"{scene.spot}: {full}, {background} background",
        f"{background} background with {full} {scene.spot}",
        f"{thing.name} {scene.spot}, {dice.pick(SIZES[thing.size])}",
    ]


def _forms_of_several(scene: Scene, dice: Dice) -> list[str]:
    subject, background = scene.things[0], scene.background

    def related(to: Callable[[Thing], str]) -> str:
        """Say how the subject lies to each other thing, which goes by what `to` calls it."""
        return " and ".join(
            f"{dice.pick(RELATIONS[fact.name])} {to(scene.things[fact.object])}"
            for fact in scene.relations
        )

    full = _sized(subject, dice)
    backward = " and ".join(
        f"{_sized(scene.things[fact.object], dice)} {dice.pick(RELATIONS[INVERSE[fact.name]])} it"
        for fact in scene.relations
    )
    names = " and ".join(thing.name for thing in scene.things)
    return [
        f"{full} {related(lambda thing: _sized(thing, dice))} on {background} background",
        f"{full} with {backward}, {background} background",
        f"{names}, {subject.shape} {related(lambda thing: thing.shape)}",
        f"{background} background with {subject.name} "
        + related(lambda thing: _compared(subject, thing)),
    ]


def _compared(subject: Thing, other: Thing) -> str:
    if subject.size == other.size:
        return other.name
    return f"{'smaller' if subject.size == 'large' else 'bigger'} {other.name}"


def _sized(thing: Thing, dice: Dice) -> str:
    return f"{dice.pick(SIZES[thing.size])} {thing.name}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def add_words(caption: str, dice: Dice) -> str:
    """Put words of nothing that is seen before, behind or into a caption, as in alt texts."""
    extra, place = dice.pick(EXTRA_WORDS), dice.pick(("before", "behind", "within"))
    if place == "before":
        return f"{extra} - {caption}"
    if place == "behind":
        return f"{caption} | {extra}"
    words = caption.split()
    cut = 1 + int(dice.share() * (len(words) - 1))
    return " ".join([*words[:cut], extra, *words[cut:]])


def ask(scene: Scene, dice: Dice) -> list[dict[str, Any]]:
    """Ask questions that have one right answer, of one or two words; types are those of VQA v2."""
    thing, number = dice.pick(scene.things), len(scene.things)
    questions = [
        (f"what color is the {thing.shape}?", thing.color),
        (f"what shape is the {thing.color} thing?", thing.shape),
        ("how many shapes are there?", NUMBERS[number]),
        ("what is the background like?", scene.background),
        (f"is the {thing.name} small or large?", thing.size),
    ]
    if dice.share() < 0.5:
        questions.append((f"is there {_article(thing.name)}?", "yes"))
    else:
        questions.append((f"is there {_article(_absent(scene, dice))}?", "no"))
    for fact in scene.relations:
        first, second = scene.things[fact.subject], scene.things[fact.object]
        is_true = dice.share() < 0.5
        name = fact.name if is_true else INVERSE[fact.name]
        asked = f"is the {first.name} {name} the {second.name}?"
        questions.append((asked, "yes" if is_true else "no"))
        # With three things a third may lie in that direction too, diagonally.
        if number == 2:
            questions.append((f"what is {fact.name} the {second.name}?", first.name))
    return [
        {"question": question, "answers": [answer], "answer_type": _answer_type(answer)}
        for question, answer in questions
    ]


def _answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer in NUMBERS else "other"


def _absent(scene: Scene, dice: Dice) -> str:
    """Name a thing that is not there, though half of it is: shapes differ within a scene."""
    thing = dice.pick(scene.things)
    if dice.share() < 0.5:
        return f"{dice.pick([color for color in COLORS if color != thing.color])} {thing.shape}"
    return f"{thing.color} {dice.pick([shape for shape in OUTLINES if shape != thing.shape])}"


def state(scene: Scene, dice: Dice) -> list[dict[str, str]]:
    """State what follows from the picture, what contradicts it and what it leaves open."""
    number = len(scene.things)
    thing = dice.pick(scene.things)
    other = dice.pick([name for name in BACKGROUNDS if name != scene.background])
    wrong_number = dice.pick([count for count in (1, 2, 3, 4) if count != number])
    true = [
        f"there is {_article(thing.name)}",
        f"the background is {scene.background}",
        f"the {thing.shape} is {thing.color}",
        _count(number),
    ]
    false = [
        f"there is {_article(_absent(scene, dice))}",
        f"the background is {other}",
        f"the {thing.shape} is {dice.pick([name for name in COLORS if name != thing.color])}",
        _count(wrong_number),
    ]
    for fact in scene.relations:
        first, second = scene.things[fact.subject].name, scene.things[fact.object].name
        true.append(f"the {first} is {dice.pick(RELATIONS[fact.name])} the {second}")
        false.append(f"the {first} is {dice.pick(RELATIONS[INVERSE[fact.name]])} the {second}")
    open_ended = [
        f"the {thing.name} was painted by a child",
        f"the {thing.name} is made of paper",
        f"somebody will move the {thing.name} tomorrow",
        f"the {thing.shape} is older than the background",
        "the picture hangs in a school",
        "there is a name on the back of the picture",
    ]
    labels = {"entailment": true, "contradiction": false, "neutral": open_ended}
    return [
        {"sentence": sentence, "label": label}
        for label, sentences in labels.items()
        for sentence in dice.deal(sentences, 2)
    ]


def _count(number: int) -> str:
    return "there is one shape" if number == 1 else f"there are {NUMBERS[number]} shapes"


def compare(left: Scene, right: Scene, dice: Dice) -> list[dict[str, Any]]:
    """State two things about a pair of pictures, each true or false with even odds."""
    shape, color = dice.pick(
        [(thing.shape, thing.color) for thing in (*left.things, *right.things)]
    )
    background = dice.pick((left.background, right.background))
    same = left.background == right.background
    total = len(left.things) + len(right.things)
    guess = dice.pick((total - 1, total, total, total + 1))
    in_left = any(shape == thing.shape for thing in left.things)
    in_right = any(shape == thing.shape for thing in right.things)
    both_color = all(any(color == thing.color for thing in scene.things) for scene in (left, right))
    sentences = {
        f"there is a {shape} in both images": in_left and in_right,
        f"exactly one image shows a {shape}": in_left != in_right,
        f"the left image shows a {shape}": in_left,
        f"the right image shows a {shape}": in_right,
        f"something {color} is in both images": both_color,
        "the left image shows more shapes than the right one": len(left.things) > len(right.things),
        "both images show the same number of shapes": len(left.things) == len(right.things),
        f"the images show {guess} shapes in total": guess == total,
        "both backgrounds are alike": same,
        f"the left background is {background}": left.background == background,
        f"the right background is {background}": right.background == background,
    }
    chosen = []
    for _ in range(2):
        wanted = dice.share() < 0.5
        # Neither list runs empty: two sentences or more are true, and two or more are false.
        options = [sentence for sentence, label in sentences.items() if label == wanted]
        sentence = dice.pick(options)
        chosen.append({"sentence": sentence, "label": sentences.pop(sentence)})
    return chosen
