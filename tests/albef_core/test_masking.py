import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from albef_core.masking import NOT_SCORED, mask_words
from albef_core.tokenizer import Tokenizer

TOKENIZER = Tokenizer.learn(["a brown dog runs over the green grass", "two"], vocab_size=80)
FIXED = [TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id]
WORD = max(TOKENIZER.special_ids) + 1


def masked(token_ids: np.ndarray, *, seed: int = 0, share: float = 0.15, words_only: bool = True):
    return mask_words(
        token_ids.astype(np.int32),
        rng=np.random.default_rng(seed),
        mask_share=share,
        tokenizer=TOKENIZER,
        words_only=words_only,
    )


def some_ids() -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(
        np.int32,
        arrays.array_shapes(min_dims=1, max_dims=2, max_side=12),
        elements=st.integers(0, TOKENIZER.vocab_size - 1),
    )


@settings(deadline=None)  # other processes share the cores
@given(token_ids=some_ids(), seed=st.integers(0, 999), words_only=st.booleans())
def test_labels_hold_the_original_id_where_scored_and_the_rest_is_untouched(
    token_ids, seed, words_only
):
    masked_ids, labels = masked(token_ids, seed=seed, share=0.5, words_only=words_only)
    scored = labels != NOT_SCORED
    np.testing.assert_array_equal(labels[scored], token_ids[scored])
    np.testing.assert_array_equal(masked_ids[~scored], token_ids[~scored])
    assert not np.isin(token_ids[scored], FIXED).any()
    assert masked_ids.dtype == labels.dtype == np.int32


@settings(deadline=None)  # other processes share the cores
@given(token_ids=some_ids(), share=st.sampled_from([0.0, 1.0]))
def test_every_word_is_scored_at_share_one_and_none_at_share_zero(token_ids, share):
    _, labels = masked(token_ids, share=share)
    expected = np.zeros(token_ids.shape, bool) if share == 0 else ~np.isin(token_ids, FIXED)
    np.testing.assert_array_equal(labels != NOT_SCORED, expected)


def test_fifteen_percent_are_scored_and_split_80_10_10():
    words = np.full((1000, 100), WORD)
    masked_ids, labels = masked(words)
    scored = masked_ids[labels != NOT_SCORED]
    num_others = TOKENIZER.vocab_size - len(TOKENIZER.special_ids) - 1
    # 5 standard deviations of each share, of 100,000 words and of about 15,000 scored ones.
    assert len(scored) / words.size == pytest.approx(0.15, abs=0.006)
    assert np.mean(scored == TOKENIZER.mask_id) == pytest.approx(0.8, abs=0.017)
    changed = (scored != TOKENIZER.mask_id) & (scored != WORD)
    assert np.mean(changed) == pytest.approx(0.1 * num_others / (num_others + 1), abs=0.0125)


def random_replacements(*, words_only: bool) -> set[int]:
    masked_ids, _ = masked(np.full((400, 400), WORD), share=1.0, words_only=words_only)
    return set(masked_ids[masked_ids != TOKENIZER.mask_id].tolist())


def test_random_ids_are_every_word_and_no_special_token():
    everything = set(range(TOKENIZER.vocab_size))
    assert random_replacements(words_only=True) == everything - TOKENIZER.special_ids


def test_random_ids_of_the_published_code_are_the_whole_vocabulary():
    everything = set(range(TOKENIZER.vocab_size))
    assert random_replacements(words_only=False) | {TOKENIZER.mask_id} == everything


def test_the_same_generator_masks_the_same_words():
    words = np.full((4, 20), WORD)
    for first, second in zip(masked(words, seed=5), masked(words, seed=5), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(masked(words, seed=5)[1], masked(words, seed=6)[1])


def test_one_caption_is_masked_as_a_batch_of_one():
    words = np.full(20, WORD)
    np.testing.assert_array_equal(masked(words, share=0.5)[0], masked(words[None], share=0.5)[0][0])


@pytest.mark.parametrize("keep_sep", [True, False])
def test_an_empty_caption_has_nothing_to_mask(keep_sep):
    token_ids = TOKENIZER.encode([""], max_tokens=25, keep_sep=keep_sep, pad_to_max=True)
    masked_ids, labels = masked(token_ids, share=1.0)
    np.testing.assert_array_equal(masked_ids, token_ids)
    assert (labels == NOT_SCORED).all()
