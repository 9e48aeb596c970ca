import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.tasks import retrieval
from albef_core.tasks.retrieval import (
    EncodedImages,
    EncodedTexts,
    candidates,
    encode_texts,
    itc_similarity,
    itm_logits,
    rank_judged,
    rerank,
    wanted_pairs,
)
from albef_core.weights import apply_weights, read_official
from tests.albef_core.replay import sizes_of
from tests.golden_folder import GOLDEN, needs_golden

# The official code's own float32 and float64 runs differ by 2e-5 here (metrics.json).
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
NUM_IMAGES, NUM_TEXTS = 5, 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=16, patch_size=8, image_width=16, image_layers=1, image_heads=2,
        text_width=16, text_heads=2, text_mlp_width=32, text_layers=1, fusion_layers=2,
        vocab_size=50, max_positions=16, feature_size=8,
    )  # fmt: skip
    return ALBEF(config).eval()


@pytest.fixture(scope="module")
def images(model):
    pixels = torch.randn(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens, features = model.encode_image(pixels)
    return EncodedImages(tokens=tokens, features=features)


@pytest.fixture(scope="module")
def texts(model):
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(1, 50, (NUM_TEXTS, 7), generator=generator)
    lengths = torch.tensor([7, 3, 4, 5, 6, 2, 4, 3])
    mask = torch.arange(7) < lengths[:, None]
    return encode_texts(model, token_ids * mask, mask, batch_size=3)


def ranking(scores, dim):
    return scores.argsort(dim=dim, descending=True)


def test_texts_are_encoded_alike_in_any_batch_size(model, texts):
    mask = texts.attention_mask
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(1, 50, (NUM_TEXTS, 7), generator=generator) * mask
    whole = encode_texts(model, token_ids, mask, batch_size=100)
    torch.testing.assert_close(whole.tokens, texts.tokens)
    torch.testing.assert_close(whole.features, texts.features)


def test_itc_similarity_is_a_cosine(images, texts):
    similarity = itc_similarity(images, texts)
    expected = torch.nn.functional.cosine_similarity(
        images.features[:, None], texts.features[None], dim=-1
    )
    torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("block_bytes", [0, 6000, 2**30], ids=["one image", "two", "all"])
def test_itm_equals_judging_one_pair_at_a_time(model, images, texts, monkeypatch, block_bytes):
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", block_bytes)
    pairs = torch.tensor([[0, 0], [4, 1], [2, 7], [2, 5], [1, 1]])
    logits = itm_logits(model, images, texts, pairs, batch_size=2)
    for (image, text), row in zip(pairs.tolist(), logits, strict=True):
        fused = model.fuse(
            texts.tokens[[text]], texts.attention_mask[[text]], images.tokens[[image]]
        )
        torch.testing.assert_close(row, model.itm_head(fused[0, 0]))


def test_progress_counts_every_pair_once(model, images, texts):
    heard = []
    pairs = torch.zeros(5, 2, dtype=torch.int64)
    itm_logits(
        model, images, texts, pairs, batch_size=2, on_pairs=lambda *counts: heard.append(counts)
    )
    assert heard == [(2, 5), (4, 5), (5, 5)]


def test_candidates_are_the_best_of_each_query():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    assert candidates(similarity, top_k=1, dim=1).tolist() == [
        [True, False, False],
        [False, False, True],
    ]
    assert candidates(similarity, top_k=1, dim=0).tolist() == [
        [True, False, True],
        [False, True, False],
    ]
    assert candidates(similarity, top_k=9, dim=0).all()


def test_with_every_candidate_the_ranking_is_that_of_itm(model, images, texts):
    scores = rerank(model, images, texts, top_k=100, batch_size=4)
    pairs = torch.cartesian_prod(torch.arange(NUM_IMAGES), torch.arange(NUM_TEXTS))
    logits = itm_logits(model, images, texts, pairs, batch_size=100)[:, 1]
    expected = logits.view(NUM_IMAGES, NUM_TEXTS).double()
    torch.testing.assert_close(scores.image_to_text, expected)
    torch.testing.assert_close(scores.text_to_image, expected)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_below_the_top_k_the_order_is_that_of_itc(model, images, texts, top_k, dim):
    scores = rerank(model, images, texts, top_k=top_k, batch_size=4)
    way = scores.image_to_text if dim == 1 else scores.text_to_image
    by_itc = ranking(itc_similarity(images, texts), dim)
    found = ranking(way, dim)
    inside, outside = slice(None, top_k), slice(top_k, None)
    for itc, itm in zip(by_itc.unbind(1 - dim), found.unbind(1 - dim), strict=True):
        assert itm[outside].tolist() == itc[outside].tolist()
        assert set(itm[inside].tolist()) == set(itc[inside].tolist())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_what_was_judged_for_a_large_k_serves_a_smaller_one(model, images, texts, top_k):
    similarity = itc_similarity(images, texts)
    pairs = wanted_pairs(similarity, top_k=4)
    matched = torch.full_like(similarity, torch.nan)
    matched[tuple(pairs.T)] = itm_logits(model, images, texts, pairs, batch_size=4)[:, 1]
    found = rank_judged(similarity, matched, top_k=top_k)
    expected = rerank(model, images, texts, top_k=top_k, batch_size=4)
    torch.testing.assert_close(found.image_to_text, expected.image_to_text)
    torch.testing.assert_close(found.text_to_image, expected.text_to_image)


def test_equally_similar_candidates_never_lack_a_judgment(model, texts, images):
    same = EncodedTexts(
        tokens=texts.tokens[:1].expand(6, -1, -1),
        attention_mask=texts.attention_mask[:1].expand(6, -1),
        features=texts.features[:1].expand(6, -1),
    )
    similarity = itc_similarity(images, same)
    matched = torch.full_like(similarity, torch.nan)
    for_text = candidates(similarity, top_k=3, dim=1)
    matched[for_text | candidates(similarity, top_k=3, dim=0)] = 1.0
    for top_k in (1, 2, 3):
        scores = rank_judged(similarity, matched, top_k=top_k)
        assert (scores.image_to_text == 1).sum(dim=1).tolist() == [top_k] * NUM_IMAGES
        assert not scores.image_to_text.isnan().any()


@needs_golden
def test_the_scores_equal_the_official_evaluation():
    folder = GOLDEN / "retrieval"
    recorded = load_file(folder / "eval" / "tensors.safetensors")
    official = ALBEF(sizes_of(json.loads((folder / "config.json").read_text())))
    state = read_official(folder / "checkpoint_init.safetensors")
    apply_weights(official, state, source="golden", may_miss=("mlm_head.",), may_add=("",))
    official.eval()
    with torch.inference_mode():
        tokens, features = official.encode_image(recorded["image"])
    images = EncodedImages(tokens=tokens, features=features)
    mask = recorded["attention_mask"].bool()
    texts = encode_texts(official, recorded["input_ids"], mask, batch_size=5)
    torch.testing.assert_close(images.features, recorded["image_embeds"], **FLOAT32)
    torch.testing.assert_close(texts.features, recorded["text_embeds"], **FLOAT32)
    torch.testing.assert_close(
        itc_similarity(images, texts), recorded["sims_matrix_i2t"], **FLOAT32
    )
    depths = [name.removeprefix("score_i2t_k") for name in recorded if "score_i2t_k" in name]
    assert depths
    for depth in depths:
        scores = rerank(official, images, texts, top_k=int(depth), batch_size=5)
        for found, expected, dim in (
            (scores.image_to_text, recorded[f"score_i2t_k{depth}"], 1),
            (scores.text_to_image, recorded[f"score_t2i_k{depth}"].T, 0),
        ):
            is_judged = expected != -100
            torch.testing.assert_close(found[is_judged].float(), expected[is_judged], **FLOAT32)
            # Whatever was not judged comes after all that was.
            outside = found.masked_fill(is_judged, -torch.inf)
            lowest = found.masked_fill(~is_judged, torch.inf).amin(dim=dim)
            assert (outside.amax(dim=dim) < lowest).all()
