"""Cleaning of captions and questions: which words the tokenizer gets to see, and how many."""

import re

SHORT, MEDIUM = 5, 10
"""Words up to which a text is short, and medium."""
_DROPPED = ",.'!?\"()*#:;~"
_CHARACTERS = str.maketrans({**dict.fromkeys(_DROPPED, None), "-": " ", "/": " "})
_WHITE_RUN = re.compile(r"\s{2,}")


def clean_caption(raw: str, *, max_words: int) -> str:
    """Clean a caption as the published data code does, and cut it to `max_words` words.

    Lower case, most punctuation dropped, hyphen and slash as spaces, the tag `<person>` as a plain
    word, runs of white space as one space (a single tab or newline stays: to the tokenizer it is
    a space). Nothing may be left: a caption of only punctuation is "".
    """
    text = _WHITE_RUN.sub(" ", _simplify(raw).replace("<person>", "person"))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(raw: str, *, max_words: int) -> str:
    """Clean a question as the published data code does: as a caption, but for white space and tags.

    White space inside stays as it is, so that a double space counts as an empty word; only spaces
    at the end go.
    """
    return _first_words(_simplify(raw).rstrip(" "), max_words)


def _simplify(raw: str) -> str:
    return raw.lower().translate(_CHARACTERS)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ", maxsplit=max_words)[:max_words])


def length_name(text: str) -> str:
    """Call a text short, medium or long, by its words: a slice of evaluations."""
    num_words = len(text.split())
    return "short" if num_words <= SHORT else "medium" if num_words <= MEDIUM else "long"
