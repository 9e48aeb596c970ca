import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.captions import clean_caption, clean_question, length_name
from tests.golden_folder import GOLDEN, needs_golden


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((GOLDEN / "text" / "text.json").read_text(encoding="utf-8"))


@needs_golden
@pytest.mark.parametrize(("max_words", "field"), [(30, "pre_caption"), (5, "pre_caption_5_words")])
def test_captions_are_cleaned_as_recorded(recorded, max_words, field):
    captions = recorded["captions"]
    cleaned = [clean_caption(caption["raw"], max_words=max_words) for caption in captions]
    assert cleaned == [caption[field] for caption in captions]


@needs_golden
@pytest.mark.parametrize("max_words", [30, 50, 5])
def test_questions_are_cleaned_as_recorded(recorded, max_words):
    questions = recorded["questions"]
    cleaned = [clean_question(question["raw"], max_words=max_words) for question in questions]
    assert cleaned == [question[f"pre_question_{max_words}"] for question in questions]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("", ""),
        (" \n ", ""),
        ("...!? -- //", ""),
        ("\N{GRINNING FACE}\N{CAT FACE}", "\N{GRINNING FACE}\N{CAT FACE}"),
        ("a\tdog\nruns", "a\tdog\nruns"),
        ("a \t dog\n\nruns\n", "a dog runs"),
        ("TH\u00c9 vert", "th\u00e9 vert"),
        ("<PERSON>'s well-known half/half", "persons well known half half"),
    ],
    ids=["empty", "white", "punctuation", "emoji", "tab", "white runs", "accents", "tag"],
)  # fmt: skip
def test_what_cleaning_leaves_of_an_unusual_caption(raw, cleaned):
    assert clean_caption(raw, max_words=30) == cleaned


def test_a_caption_of_5000_words_keeps_its_first_thirty():
    words = [f"word{number}" for number in range(5000)]
    assert clean_caption(" ".join(words), max_words=30) == " ".join(words[:30])


@settings(deadline=None)  # other processes share the cores
@given(raw=st.text(), max_words=st.integers(1, 40))
def test_a_clean_caption_holds_no_dropped_character_and_few_words(raw, max_words):
    cleaned = clean_caption(raw, max_words=max_words)
    assert not set(cleaned) & set(",.'!?\"()*#:;~-/")
    assert cleaned == "" or len(cleaned.split(" ")) <= max_words
    assert clean_caption(cleaned, max_words=max_words).split() == cleaned.split()


@pytest.mark.parametrize(
    ("num_words", "name"), [(1, "short"), (5, "short"), (6, "medium"), (10, "medium"), (11, "long")]
)
def test_lengths_have_names(num_words, name):
    assert length_name(" ".join(["word"] * num_words)) == name
