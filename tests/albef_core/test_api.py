"""The Python API gives what the functions below it give, and refuses what makes no sense."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from albef_core.api import Albef
from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.config import ModelConfig, TextConfig, corrected
from albef_core.model import ALBEF
from albef_core.preprocess import resize_square
from albef_core.tasks.grounding import itm_looks
from albef_core.tasks.retrieval import EncodedImages, encode_texts, rerank
from albef_core.tokenizer import Tokenizer
from albef_core.weights import save_model, save_official
from tests.albef_core.weight_checks import refusal

TOKENIZER = Tokenizer.learn(["a brown dog runs over the green grass"] * 3, vocab_size=100)
TEXTS = ["A brown dog, runs!", "green grass", "the dog over the grass runs", "a a dogs", "brown"]
# Other batch sizes and other padding: float32 sums in another order.
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def model(tiny_config: ModelConfig, make_model: Callable[..., ALBEF]) -> ALBEF:
    config = replace(tiny_config, vocab_size=TOKENIZER.vocab_size, fusion_layers=3, dropout=0.1)
    return make_model(config)


@pytest.fixture
def folder(tmp_path: Path, tiny_config: ModelConfig, model: ALBEF) -> Path:
    """A model folder on disk."""
    config = replace(tiny_config, vocab_size=TOKENIZER.vocab_size, fusion_layers=3, dropout=0.1)
    save_model(
        tmp_path / "model",
        model,
        model_config=config,
        text_config=TextConfig(tokenizer="corpus", max_tokens=9),
        recipe=corrected(),
        tokenizer=TOKENIZER,
    )
    return tmp_path / "model"


@pytest.fixture
def albef(folder: Path) -> Albef:
    return Albef.load(folder, batch_size=2)


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (16, 16), (40, 10), (9, 33), (16, 50)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def pixels(pictures: list[np.ndarray]) -> Tensor:
    return normalize(torch.from_numpy(np.stack([resize_square(p, 16) for p in pictures])))


def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
    cleaned = [clean_caption(text, max_words=30) for text in texts]
    ids = torch.from_numpy(TOKENIZER.encode(cleaned, max_tokens=9, keep_sep=True))
    return ids, ids != TOKENIZER.pad_id


def test_embeddings_are_the_encoders_unit_vectors(
    albef: Albef, model: ALBEF, pictures: list[np.ndarray]
) -> None:
    model.eval()
    images, texts = albef.embed_images(pictures), albef.embed_texts(TEXTS)
    _, image_features = model.encode_image(pixels(pictures))
    _, text_features = model.encode_text(*tokens(TEXTS))
    np.testing.assert_allclose(images, image_features.detach().numpy(), **ROUNDING)
    np.testing.assert_allclose(texts, text_features.detach().numpy(), **ROUNDING)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)


def test_a_match_is_the_probability_of_the_matching_head(
    albef: Albef, model: ALBEF, pictures: list[np.ndarray]
) -> None:
    model.eval()
    image_tokens, _ = model.encode_image(pixels(pictures))
    ids, mask = tokens(TEXTS)
    text_tokens, _ = model.encode_text(ids, mask)
    fused = model.fuse(text_tokens, mask, image_tokens)
    expected = model.itm_head(fused[:, 0]).softmax(dim=1)[:, 1]
    found = albef.match(pictures, TEXTS)
    np.testing.assert_allclose(found, expected.detach().numpy(), **ROUNDING)


@pytest.mark.parametrize("top_k", [1, 2, 50])
def test_the_ranking_is_that_of_the_evaluation(
    albef: Albef, model: ALBEF, pictures: list[np.ndarray], top_k: int
) -> None:
    model.eval()
    with torch.inference_mode():
        image_tokens, features = model.encode_image(pixels(pictures[:4]))
    images = EncodedImages(tokens=image_tokens, features=features)
    texts = encode_texts(model, *tokens(TEXTS), batch_size=100)
    scores = rerank(model, images, texts, top_k=top_k, batch_size=100)
    found = albef.rank(pictures[:4], TEXTS, top_k=top_k)
    assert found.texts.shape == found.text_scores.shape == (4, min(top_k, 5))
    assert found.images.shape == found.image_scores.shape == (5, min(top_k, 4))
    by_image, by_text = scores.image_to_text.numpy(), scores.text_to_image.numpy().T
    for matrix, places, values in (
        (by_image, found.texts, found.text_scores),
        (by_text, found.images, found.image_scores),
    ):
        best = np.argsort(-matrix, axis=1)[:, : places.shape[1]]
        np.testing.assert_array_equal(places, best)
        np.testing.assert_allclose(values, np.take_along_axis(matrix, best, axis=1), **ROUNDING)


def test_each_word_is_explained_by_the_mean_of_its_pieces(
    albef: Albef, model: ALBEF, pictures: list[np.ndarray]
) -> None:
    model.eval()
    ids, mask = tokens(TEXTS)
    (look,), logits = itm_looks(model, pixels(pictures), ids, mask, layers=[1])
    maps = look.token_maps(head=1).numpy()
    explanations = albef.explain(pictures, TEXTS, layer=1, head=1)
    matches = [explanation.match for explanation in explanations]
    np.testing.assert_allclose(matches, logits.softmax(dim=1)[:, 1].numpy(), **ROUNDING)
    for row, (text, explanation) in enumerate(zip(TEXTS, explanations, strict=True)):
        assert explanation.words == tuple(clean_caption(text, max_words=30).split())
        assert explanation.maps.shape == (len(explanation.words), 2, 2)
        pieces = TOKENIZER.words(ids[row].tolist())
        begins = [n for n, piece in enumerate(pieces) if piece not in ("[CLS]", "[PAD]")]
        words = [n for n in begins if not pieces[n].startswith("##")]
        for word, (start, end) in enumerate(pairwise(words)):
            expected = maps[row, start:end].mean(axis=0)
            np.testing.assert_allclose(explanation.maps[word], expected, rtol=1e-3, atol=1e-6)
    assert any(piece.startswith("##") for piece in TOKENIZER.words(ids.flatten().tolist()))


def test_the_default_layer_is_the_last_of_the_lower_half(
    albef: Albef, pictures: list[np.ndarray]
) -> None:
    (default,) = albef.explain(pictures[:1], TEXTS[:1])
    (middle,) = albef.explain(pictures[:1], TEXTS[:1], layer=1)
    np.testing.assert_array_equal(default.maps, middle.maps)


def test_an_empty_text_has_no_words_to_explain(albef: Albef, pictures: list[np.ndarray]) -> None:
    (found,) = albef.explain(pictures[:1], ["..."])
    assert found.words == ()
    assert found.maps.shape == (0, 2, 2)


def test_every_blank_is_filled_with_a_look_at_the_picture(
    albef: Albef, model: ALBEF, pictures: list[np.ndarray]
) -> None:
    model.eval()
    texts = ["a [MASK] dog", "the [MASK] runs over [MASK].", "[MASK]"]
    found = albef.fill_mask(pictures[:3], texts, top_k=4)
    assert [len(blanks) for blanks in found] == [1, 2, 1]
    rows = ["a [MASK] dog", "the [MASK] runs over [MASK]", "[MASK]"]
    for picture, row, blanks in zip(pictures, rows, found, strict=False):
        ids = torch.from_numpy(TOKENIZER.encode([row], max_tokens=9, keep_sep=True))
        mask = torch.ones_like(ids, dtype=torch.bool)
        image_tokens, _ = model.encode_image(pixels([picture]))
        text_tokens, _ = model.encode_text(ids, mask)
        fused = model.fuse(text_tokens, mask, image_tokens)
        shares = model.mlm_head(fused[ids == TOKENIZER.mask_id]).softmax(dim=1)
        for blank, share in zip(blanks, shares, strict=True):
            best = share.topk(4)
            assert blank.words == tuple(TOKENIZER.words(best.indices.tolist()))
            expected = best.values.detach().numpy()
            np.testing.assert_allclose(blank.probabilities, expected, **ROUNDING)


def test_the_batch_size_changes_nothing_but_rounding(
    folder: Path, pictures: list[np.ndarray]
) -> None:
    one, all_at_once = Albef.load(folder, batch_size=1), Albef.load(folder, batch_size=100)
    for answer in (
        lambda albef: albef.embed_images(pictures),
        lambda albef: albef.embed_texts(TEXTS),
        lambda albef: albef.match(pictures, TEXTS),
        lambda albef: albef.rank(pictures, TEXTS, top_k=3).text_scores,
        lambda albef: np.concatenate([e.maps for e in albef.explain(pictures, TEXTS)]),
    ):
        np.testing.assert_allclose(answer(one), answer(all_at_once), rtol=1e-3, atol=1e-5)


def test_answers_keep_the_order_of_the_questions(albef: Albef, pictures: list[np.ndarray]) -> None:
    order = [3, 0, 4, 1, 2]
    shuffled = [pictures[n] for n in order], [TEXTS[n] for n in order]
    np.testing.assert_allclose(
        albef.match(*shuffled), albef.match(pictures, TEXTS)[order], **ROUNDING
    )
    embedded = albef.embed_images(pictures)
    np.testing.assert_allclose(albef.embed_images(shuffled[0]), embedded[order], **ROUNDING)


def test_files_pil_images_and_pixels_are_the_same_picture(
    albef: Albef, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    image = Image.fromarray(pictures[0])
    image.save(file)
    found = albef.embed_images([pictures[0], image, file, str(file)])
    np.testing.assert_allclose(found, np.repeat(found[:1], 4, axis=0), **ROUNDING)


def test_a_rotated_file_is_upright_in_all_its_forms(albef: Albef, tmp_path: Path) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    file = tmp_path / "rotated.png"
    Image.fromarray(np.rot90(upright)).save(file, exif=exif)
    with Image.open(file) as opened:
        found = albef.embed_images([upright, file, opened])
    np.testing.assert_allclose(found, np.repeat(found[:1], 3, axis=0), **ROUNDING)


def test_nothing_in_gives_nothing_out(albef: Albef) -> None:
    assert albef.embed_images([]).shape == albef.embed_texts([]).shape == (0, 8)
    assert albef.match([], []).shape == (0,)
    assert albef.explain([], []) == albef.fill_mask([], []) == []


def test_an_official_checkpoint_answers_too(tmp_path: Path, tiny_config: ModelConfig) -> None:
    config = replace(  # an official file tells no number of heads: they are 64 wide
        tiny_config,
        image_width=64,
        image_heads=1,
        text_width=64,
        text_heads=1,
        vocab_size=TOKENIZER.vocab_size,
        max_positions=40,
    )
    save_official(tmp_path / "ALBEF.pth", ALBEF(config), None, None, config)
    TOKENIZER.save(tmp_path)
    albef = Albef.load(tmp_path / "ALBEF.pth")
    assert albef.embed_texts(TEXTS).shape == (5, 8)


def test_a_checkpoint_without_the_head_of_words_fills_no_blank(
    tmp_path: Path, albef: Albef, pictures: list[np.ndarray]
) -> None:
    loaded = albef.loaded
    report = replace(loaded.report, source="retrieval.pth", missing=("mlm_head.norm.weight",))
    headless = Albef(replace(loaded, report=report))
    refusal(lambda: headless.fill_mask(pictures[:1], ["a [MASK]"]), "retrieval.pth", "MLM")


def test_mistakes_are_refused_in_one_line(
    albef: Albef, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    missing, broken = tmp_path / "missing.jpg", tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    refusal(lambda: albef.embed_images([missing]), missing)
    refusal(lambda: albef.embed_images([str(broken)]), broken)
    refusal(lambda: albef.embed_images([tmp_path]), tmp_path)
    refusal(lambda: albef.embed_images([pictures[0] / 255]), "float64")
    refusal(lambda: albef.embed_images([pictures[0][:, :, 0]]), "(20, 30)")
    refusal(lambda: albef.embed_texts("a dog"), "a dog", "list")
    refusal(lambda: albef.match(pictures, TEXTS[:2]), 5, 2)
    refusal(lambda: albef.rank(pictures, []), 5, 0)
    refusal(lambda: albef.explain(pictures, TEXTS, layer=3), "layer 3", "0 to 2")
    refusal(lambda: albef.explain(pictures, TEXTS, head=-1), "head -1", "0 to 1")
    refusal(lambda: albef.fill_mask(pictures[:1], ["a dog"]), "a dog", "[MASK]")
    refusal(lambda: albef.fill_mask(pictures[:1], ["a dog " * 9 + "[MASK]"]), "9 tokens")


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    nothing, damaged = tmp_path / "nothing", tmp_path / "damaged.pth"
    damaged.write_bytes(b"no weights")
    refusal(lambda: Albef.load(nothing), nothing)
    refusal(lambda: Albef.load(damaged), damaged)
    refusal(lambda: Albef.load(tmp_path), tmp_path)
