"""What a pair is: a pure function of (seed, epoch, image), and what happens to damaged pictures."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from albef_core.captions import clean_caption
from albef_core.errors import InputError
from albef_core.tokenizer import Tokenizer
from pipelines.order import Stream, epoch_order, generator
from pipelines.pairs import image_key, open_corpus, prepare_block
from tests.conftest import picture_row, write_corpus

COLUMNS = ("images", "token_ids", "masked_ids", "mlm_labels", "image_keys", "image_ids", "captions")


def test_a_block_cut_in_two_holds_the_same_pairs(spec):
    whole = prepare_block(spec, step=3, start=0, stop=32)
    left = prepare_block(spec, step=3, start=0, stop=13)
    right = prepare_block(spec, step=3, start=13, stop=32)
    for name, column in whole.items():
        assert np.array_equal(column, np.concatenate([left[name], right[name]])), name


def test_images_come_in_the_order_of_the_epoch(spec):
    corpus = open_corpus(spec.corpus)
    order = epoch_order(corpus.group_rows, seed=spec.seed, epoch=1)
    block = prepare_block(spec, step=6 + 2, start=4, stop=20)  # 203 images: 6 steps of 32 an epoch
    expected = [corpus.read(row).image_id for row in order[2 * 32 + 4 : 2 * 32 + 20]]
    assert block["image_ids"].tolist() == expected
    assert block["position"].tolist() == list(range(4, 20))


def test_a_row_is_found_across_shards_and_short_groups(spec):
    corpus = open_corpus(spec.corpus)
    found = [corpus.read(row).image_id for row in range(corpus.num_images)]
    assert found == [f"picture-{number:03d}" for number in range(203)]


def test_a_picture_looks_the_same_wherever_the_batch_size_puts_it(spec):
    small = prepare_block(spec, step=1, start=0, stop=32)
    large = prepare_block(replace(spec, batch_size=64), step=0, start=32, stop=64)
    for name in COLUMNS:
        assert np.array_equal(small[name], large[name]), name


def test_the_next_epoch_shows_an_image_in_another_way(spec):
    spec = replace(spec, batch_size=203)
    first, second = (prepare_block(spec, step=epoch, start=0, stop=203) for epoch in range(2))
    by_key = np.argsort(first["image_keys"]), np.argsort(second["image_keys"])
    assert np.array_equal(first["image_keys"][by_key[0]], second["image_keys"][by_key[1]])
    same = first["images"][by_key[0]] == second["images"][by_key[1]]
    assert not same.reshape(203, -1).all(axis=1).any()


def test_pixels_that_overflow_as_published_are_other_pixels_of_the_same_pictures(spec):
    spec = replace(spec, batch_size=128)
    saturated = prepare_block(spec, step=0, start=0, stop=128)
    published = prepare_block(replace(spec, saturate_pixels=False), step=0, start=0, stop=128)
    same = (saturated["images"] == published["images"]).reshape(128, -1).all(axis=1)
    assert 64 < same.sum() < 128  # only AutoContrast and Sharpness overflow
    assert np.array_equal(saturated["masked_ids"], published["masked_ids"])


def test_captions_are_the_images_own_and_both_get_chosen(spec):
    corpus = open_corpus(spec.corpus)
    block = prepare_block(replace(spec, batch_size=203), step=0, start=0, stop=203)
    sources = {corpus.read(row).image_id: corpus.read(row).captions for row in range(203)}
    chosen = [
        sources[image_id].index(caption)
        for image_id, caption in zip(block["image_ids"], block["captions"], strict=True)
    ]
    # 203 fair coins: four deviations.
    assert 73 < sum(chosen) < 130


@pytest.fixture
def many_captions(spec, tmp_path):
    """A feed of 40 images with one to five captions each, in batches that hold them all."""
    rows = [picture_row(number) for number in range(40)]
    for number, row in enumerate(rows):
        row["captions"] = [f"caption {turn} of {number}" for turn in range(1 + number % 5)]
    write_corpus(tmp_path / "corpus", rows, rows_per_shard=23, rows_per_group=7)
    return replace(spec, corpus=tmp_path / "corpus", batch_size=40, caption_policy="all")


def captions_of(spec, *, step):
    block = prepare_block(spec, step=step, start=0, stop=spec.batch_size)
    return dict(zip(block["image_ids"], block["captions"], strict=True))


def test_all_captions_come_exactly_once_in_as_many_epochs(many_captions):
    epochs = [captions_of(many_captions, step=epoch) for epoch in range(11)]
    firsts = []
    for number in range(40):
        told = [captions[f"picture-{number:03d}"] for captions in epochs]
        count = 1 + number % 5
        expected = sorted(f"caption {turn} of {number}" for turn in range(count))
        for start in range(11 - count):
            assert sorted(told[start : start + count]) == expected
        firsts.append(int(told[0].split()[1]))
    # The turns differ between images, so an epoch is no epoch of first captions.
    assert len({firsts[number] for number in range(4, 40, 5)}) > 2
    assert captions_of(replace(many_captions, seed=6), step=0) != epochs[0]


def test_a_caption_s_turn_depends_on_neither_batch_nor_worker_nor_call(many_captions):
    whole = [captions_of(many_captions, step=epoch) for epoch in range(3)]
    small = replace(many_captions, batch_size=8)
    for step in reversed(range(15)):  # three epochs of five batches, the last one first
        for start, stop in ((5, 8), (0, 5)):
            block = prepare_block(small, step=step, start=start, stop=stop)
            for image_id, caption in zip(block["image_ids"], block["captions"], strict=True):
                assert caption == whole[step // 5][image_id]


def test_random_captions_are_drawn_first_from_the_generator_of_the_pair(many_captions):
    random = replace(many_captions, caption_policy="random")
    for epoch in range(4):
        for image_id, caption in captions_of(random, step=epoch).items():
            number = int(image_id[-3:])
            rng = generator(Stream.PAIR, seed=5, epoch=epoch, item=image_key(image_id))
            assert caption == f"caption {rng.integers(1 + number % 5)} of {number}"


def test_random_captions_never_change_between_releases(spec):
    blocks = [prepare_block(spec, step=step, start=0, stop=32) for step in (0, 3, 8)]
    digest = hashlib.sha256()
    for block in blocks:
        digest.update("".join(block["captions"]).encode() + block["masked_ids"].tobytes())
    # This program's own, before a second policy was there to choose.
    assert digest.hexdigest()[:16] == "964e757e000232bf"


def test_tokens_are_the_cleaned_caption_and_only_masked_words_are_scored(spec):
    tokenizer = Tokenizer.load(spec.tokenizer)
    block = prepare_block(spec, step=0, start=0, stop=32)
    expected = tokenizer.encode(
        [clean_caption(caption, max_words=30) for caption in block["captions"]],
        max_tokens=spec.text.max_tokens,
        keep_sep=True,
        pad_to_max=True,
    )
    assert np.array_equal(block["token_ids"], expected)
    assert block["token_ids"].dtype == block["masked_ids"].dtype == np.int32
    is_scored = block["mlm_labels"] != -100
    assert is_scored.any()
    assert np.array_equal(block["mlm_labels"][is_scored], block["token_ids"][is_scored])
    assert np.array_equal(block["masked_ids"][~is_scored], block["token_ids"][~is_scored])


def test_the_next_image_of_the_order_stands_in_for_one_that_does_not_decode(spec, make_corpus):
    order = epoch_order([16] * 7 + [8, 16, 16], seed=spec.seed, epoch=0)
    corpus = make_corpus(152, broken=[order[3], order[4], order[31], order[151]])
    broken = replace(spec, corpus=corpus.folder)
    block = prepare_block(broken, step=0, start=0, stop=32)
    ids = [f"picture-{row:03d}" for row in order]
    assert block["image_ids"].tolist() == [*ids[:3], ids[5], ids[5], *ids[5:31], ids[32]]
    assert [image_id for image_id in block["bad_ids"] if image_id] == [ids[3], ids[4], ids[31]]
    # Three views of one picture, no two alike.
    assert len({block["images"][index].tobytes() for index in (3, 4, 5)}) == 3
    # The last of the epoch is followed by its first.
    last = prepare_block(replace(broken, batch_size=152), step=0, start=150, stop=152)
    assert last["image_ids"].tolist() == [ids[150], ids[0]]


def test_a_corpus_that_does_not_decode_at_all_is_refused(spec, make_corpus):
    corpus = make_corpus(70, broken=range(70))
    with pytest.raises(InputError, match=r"64 images in a row do not decode, from 'picture-"):
        prepare_block(replace(spec, corpus=corpus.folder), step=0, start=0, stop=8)


def test_a_picture_without_a_caption_is_refused_by_name(spec, make_corpus):
    corpus = make_corpus(8, uncaptioned=[5])
    with pytest.raises(InputError, match="picture-005 has no caption"):
        prepare_block(replace(spec, corpus=corpus.folder, batch_size=8), step=0, start=0, stop=8)


def test_image_keys_fit_a_signed_64_bit_number_and_are_never_negative():
    keys = [image_key(f"picture-{number}") for number in range(1000)]
    assert len(set(keys)) == 1000
    assert min(keys) >= 0
    assert max(keys) < 2**63
    assert image_key("") == int("e4a6a0577479b2b4", 16) >> 1  # BLAKE2b-64 of nothing


def test_a_task_imports_no_torch():
    code = "import sys, pipelines.feed; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
