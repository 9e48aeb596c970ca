import json
import pickle
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.captions import clean_caption, clean_question
from albef_core.errors import InputError
from albef_core.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.golden_folder import GOLDEN, SHARED_DATA, needs_data, needs_golden

CAPTIONS = [
    "a brown dog runs over the green grass",
    "two brown dogs run over green grass",
    "a dog catches a red ball",
    "three children catch a ball on the grass",
]
SMALL = Tokenizer.learn(CAPTIONS, vocab_size=120)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((GOLDEN / "text" / "text.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.load(SHARED_DATA / "bert-base-uncased" / "vocab.txt")


def unpadded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of the published call without truncation."""
    return tokenizer.encode([text], max_tokens=10_000, keep_sep=False)[0].tolist()


@needs_golden
@needs_data
def test_special_ids_are_the_recorded_ones(bert, recorded):
    ids = {name: getattr(bert, f"{name}_id") for name in ("pad", "cls", "sep", "mask", "unk")}
    assert {**ids, "vocab_size": bert.vocab_size} == recorded["special_ids"]


@needs_golden
@needs_data
def test_captions_have_the_recorded_ids_and_tokens(bert, recorded):
    for caption in recorded["captions"]:
        ids = unpadded(bert, caption["pre_caption"])
        assert ids == caption["ids_unpadded_untruncated"]
        assert bert.words(ids[1:]) == caption["tokens"]


@needs_golden
@needs_data
def test_raw_captions_have_the_recorded_ids_special_tokens_in_upper_case_included(bert, recorded):
    for caption in recorded["captions"]:
        ids = bert.encode([caption["raw"]], max_tokens=10_000, keep_sep=False)[0].tolist()
        assert ids == caption["raw_ids_unpadded_untruncated"], caption["raw"]


@needs_golden
@needs_data
def test_questions_have_the_recorded_ids(bert, recorded):
    for question in recorded["questions"]:
        assert unpadded(bert, question["pre_question_30"]) == question["ids_unpadded_untruncated"]


@needs_golden
@needs_data
@pytest.mark.parametrize(
    ("batch", "max_tokens", "pad_to_max"),
    [
        ("batch_captions_longest_trunc25", 25, False),
        ("batch_first8_longest_trunc25", 25, False),
        ("batch_captions_max_length_trunc30", 30, True),
        ("batch_questions_longest_trunc25", 25, False),
    ],
)
def test_padded_batches_are_the_recorded_ones(bert, recorded, batch, max_tokens, pad_to_max):
    expected = recorded[batch]
    captions = [caption["raw"] for caption in recorded["captions"]]
    texts = [clean_caption(raw, max_words=recorded["max_words"]) for raw in captions]
    if "questions" in batch:
        questions = [question["raw"] for question in recorded["questions"]]
        texts = [clean_question(raw, max_words=recorded["max_words"]) for raw in questions]
    texts = texts[: len(expected["input_ids"])]
    token_ids = bert.encode(texts, max_tokens=max_tokens, keep_sep=False, pad_to_max=pad_to_max)
    assert token_ids.tolist() == expected["input_ids"]
    assert (token_ids != bert.pad_id).astype(int).tolist() == expected["attention_mask"]


@needs_golden
@needs_data
def test_answers_end_in_the_separator_written_out_in_the_text(bert, recorded):
    answers = recorded["answers"]
    token_ids = bert.encode(answers["with_eos"], max_tokens=512, keep_sep=False)
    assert token_ids.tolist() == answers["input_ids"]


@needs_golden
@needs_data
def test_single_ids_have_the_recorded_names(bert, recorded):
    names = recorded["decode_of_single_ids"]
    assert bert.words(map(int, names)) == list(names.values())


@settings(deadline=None)  # other processes share the cores
@given(texts=st.lists(st.text(max_size=60), max_size=5), max_tokens=st.integers(3, 12))
def test_a_caption_is_cut_between_its_first_and_its_last_special_token(texts, max_tokens):
    token_ids = SMALL.encode(texts, max_tokens=max_tokens, keep_sep=True)
    plain = SMALL.encode(texts, max_tokens=max_tokens - 1, keep_sep=False)
    assert token_ids.shape[1] <= max_tokens
    for row, words in zip(token_ids, plain, strict=True):
        used = row[row != SMALL.pad_id].tolist()
        assert used == [*words[words != SMALL.pad_id].tolist(), SMALL.sep_id]


def test_encode_pads_to_the_longest_or_to_the_most():
    texts = ["a dog", "a red ball on grass"]
    assert SMALL.encode(texts, max_tokens=25, keep_sep=True).shape == (2, 7)
    padded = SMALL.encode(texts, max_tokens=25, keep_sep=True, pad_to_max=True)
    assert padded.shape == (2, 25)
    assert (padded[0, 4:] == SMALL.pad_id).all()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("", []),
        ("!!! ... ???", []),
        ("\N{GRINNING FACE}\N{CAT FACE}", ["[UNK]"]),
        ("a\tdog\nand \r\n grass", ["a", "dog", "[UNK]", "grass"]),
        ("D\N{LATIN SMALL LETTER O WITH ACUTE}g \N{CJK UNIFIED IDEOGRAPH-732B}", ["dog", "[UNK]"]),
        ("[SEP] dog", ["[UNK]", "[UNK]", "[UNK]", "dog"]),
    ],
    ids=["empty", "punctuation", "emoji", "tab and newline", "non-ASCII", "written special"],
)  # fmt: skip
@pytest.mark.parametrize("keep_sep", [True, False])
def test_what_becomes_of_an_unusual_caption(raw, words, keep_sep, tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL_TOKENS, "a", "dog", "grass"]))
    tokenizer = Tokenizer.load(vocabulary)
    text = clean_caption(raw, max_words=30)
    ids = tokenizer.encode([text], max_tokens=25, keep_sep=keep_sep)[0]
    assert tokenizer.words(ids) == ["[CLS]", *words, *(["[SEP]"] if keep_sep else [])]


def test_a_caption_of_5000_words_is_cut_to_the_room_there_is():
    text = " ".join(["grass"] * 5000)
    ids = SMALL.encode([text], max_tokens=25, keep_sep=True)[0].tolist()
    assert SMALL.words(ids) == ["[CLS]", *["grass"] * 23, "[SEP]"]


def test_a_learned_vocabulary_starts_with_the_special_tokens():
    assert SMALL.words(range(5)) == list(SPECIAL_TOKENS)
    assert (SMALL.pad_id, SMALL.unk_id, SMALL.cls_id, SMALL.sep_id, SMALL.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert SMALL.special_ids == {0, 1, 2, 3, 4}


def test_a_learned_vocabulary_knows_its_words_and_spells_others():
    assert SMALL.words(unpadded(SMALL, "Dog grass")) == ["[CLS]", "dog", "grass"]
    spelled = SMALL.words(unpadded(SMALL, "dogs"))[1:]
    assert "".join(piece.removeprefix("##") for piece in spelled) == "dogs"
    assert SMALL.unk_id not in unpadded(SMALL, "soda")


@settings(deadline=None)  # other processes share the cores
@given(vocab_size=st.integers(9, 200))
def test_a_learned_vocabulary_is_never_larger_than_asked(vocab_size):
    assert Tokenizer.learn(CAPTIONS, vocab_size=vocab_size).vocab_size <= vocab_size


def test_the_rarest_letters_give_way_in_a_small_vocabulary():
    tokenizer = Tokenizer.learn(["ab ab ab ab z"], vocab_size=13)
    assert "z" not in tokenizer.words(range(tokenizer.vocab_size))
    assert tokenizer.words(unpadded(tokenizer, "ab z")) == ["[CLS]", "ab", "[UNK]"]


def test_the_same_captions_give_the_same_vocabulary_in_another_process():
    code = (
        "import sys, json; from albef_core.tokenizer import Tokenizer\n"
        "learned = Tokenizer.learn(json.loads(sys.argv[1]), vocab_size=120)\n"
        "print(json.dumps(learned.words(range(learned.vocab_size))))"
    )
    command = [sys.executable, "-c", code, json.dumps(CAPTIONS)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == SMALL.words(range(SMALL.vocab_size))


def test_the_order_of_captions_does_not_matter():
    turned = Tokenizer.learn(CAPTIONS[::-1], vocab_size=120)
    assert turned.words(range(turned.vocab_size)) == SMALL.words(range(SMALL.vocab_size))


@pytest.mark.parametrize(
    ("captions", "vocab_size"), [([], 100), ([""], 100), (CAPTIONS, 5)], ids=["none", "empty", "5"]
)
def test_nothing_to_learn_is_refused(captions, vocab_size):
    with pytest.raises(InputError, match="No vocabulary"):
        Tokenizer.learn(captions, vocab_size=vocab_size)


@pytest.mark.parametrize("part", ["", "tokenizer.json", "vocab.txt"])
def test_a_saved_tokenizer_loads_from_its_folder_and_from_each_file(part, tmp_path):
    SMALL.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new" / part)
    assert loaded.words(range(loaded.vocab_size)) == SMALL.words(range(SMALL.vocab_size))
    texts = [*CAPTIONS, "D\N{LATIN SMALL LETTER O WITH DIAERESIS}G [SEP] xylophone"]
    np.testing.assert_array_equal(
        loaded.encode(texts, max_tokens=25, keep_sep=True),
        SMALL.encode(texts, max_tokens=25, keep_sep=True),
    )


def test_a_pickled_tokenizer_gives_the_same_ids():
    copy = pickle.loads(pickle.dumps(SMALL))
    assert unpadded(copy, CAPTIONS[0]) == unpadded(SMALL, CAPTIONS[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", None, "neither tokenizer.json nor vocab.txt"),
        ("words.txt", "dog\ncat\n", r"lacks \[PAD\]"),
        ("broken.json", "{", "not a tokenizer file"),
        ("picture.txt", b"\xff\xd8\xff", "not a tokenizer file"),
    ],
)
def test_a_wrong_file_or_folder_is_refused_with_the_reason(name, content, message, tmp_path):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        Tokenizer.load(path)


@pytest.mark.parametrize("source", ["no-such-model", "missing/folder/vocab.txt"])
def test_a_name_that_the_hub_does_not_give_is_refused(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"Pass a local folder or vocab\.txt"):
        Tokenizer.load(source)
