import json

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from albef_core import randaugment
from albef_core.randaugment import OPERATIONS, apply, rand_augment, strength
from tests.golden_folder import GOLDEN, needs_golden

# Largest difference in gray levels from the recorded pixels. All are 0, although the recording used
# OpenCV 4.5.5: `cv2.warpAffine` of OpenCV 5 itself differs by up to 2 (shears, mean 0.07) and
# 3 (rotation, mean 0.09), so the warps go through `cv2.remap` in the older version's fixed point.
TOLERANCE = dict.fromkeys(OPERATIONS, 0)

FOLDER = GOLDEN / "image_transforms"


def recorded(kind: str) -> dict[str, dict]:
    file = FOLDER / "cases.json"
    return json.loads(file.read_text())[kind] if file.exists() else {}


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "tensors.safetensors")


@pytest.fixture
def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


@needs_golden
@pytest.mark.parametrize("case", recorded("ops"))
def test_an_operation_gives_the_recorded_pixels(case, pixels):
    settings = recorded("ops")[case]
    amount = settings["args"][0] if settings["args"] else 0.0
    result = apply(pixels["aug_input"], settings["op"], amount, saturate=False)
    difference = np.abs(result.astype(int) - pixels[case].astype(int))
    assert difference.max() <= TOLERANCE[settings["op"]]


@needs_golden
@pytest.mark.parametrize("case", recorded("ops"))
def test_a_level_means_the_recorded_amount(case):
    settings = recorded("ops")[case]
    drawn = {
        strength(settings["op"], settings["level"], np.random.default_rng(seed))
        for seed in range(20)
    }
    assert (settings["args"] or [0.0])[0] in drawn


@needs_golden
@pytest.mark.parametrize("case", recorded("randaugment"))
def test_a_legacy_seed_replays_the_recorded_draws(case, pixels):
    rng = np.random.RandomState(recorded("randaugment")[case]["seed"])
    result = rand_augment(pixels["aug_input"], num_ops=2, level=7, rng=rng, saturate=False)
    np.testing.assert_array_equal(result, pixels[case])


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_shape_and_type_and_leaves_its_input_alone(name, picture):
    before = picture.copy()
    amount = strength(name, 7, np.random.default_rng(0))
    result = apply(picture, name, amount)
    assert result.shape == picture.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(picture, before)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (5, 1, 3)])
def test_an_operation_takes_a_picture_of_one_pixel_or_line(name, shape):
    amount = strength(name, 10, np.random.default_rng(0))
    assert apply(np.full(shape, 200, np.uint8), name, amount).shape == shape


def test_translation_moves_whole_pixels_and_fills_with_gray(picture):
    moved = apply(picture, "TranslateX", 7.0)
    np.testing.assert_array_equal(moved[:, :-7], picture[:, 7:])
    assert (moved[:, -7:] == 128).all()


def test_brightness_multiplies_and_stops_at_white():
    picture = np.array([[[0, 100, 200]]], np.uint8)
    assert apply(picture, "Brightness", 1.36).tolist() == [[[0, 136, 255]]]


def test_auto_contrast_stretches_each_channel_to_black_and_white(picture):
    stretched = apply(picture, "AutoContrast", 0.0)
    assert stretched.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert stretched.max(axis=(0, 1)).min() >= 254  # the published product truncates 254.99...


def test_the_published_auto_contrast_whitens_a_channel_without_black(picture):
    assert picture.min() > 0
    assert (apply(picture, "AutoContrast", 0.0, saturate=False) == 255).all()


def test_equalize_spreads_four_equal_parts_over_the_range():
    quarters = np.repeat(np.array([10, 11, 12, 13], np.uint8), 3 * 255).reshape(30, 34, 3)
    # 255 pixels each, step (3 * 255) // 255 = 3: (1 + darker) // 3 for darker = 0, 255, 510, 765
    assert np.unique(apply(quarters, "Equalize", 0.0)).tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize(("saturate", "peak"), [(True, 255), (False, 306 - 256)])
def test_sharpening_stops_at_white_where_the_published_code_wraps(saturate, peak):
    picture = np.full((3, 3, 3), 96, np.uint8)
    picture[1, 1] = 226  # smoothed: (8 * 96 + 5 * 226) / 13 = 146; 146 + 2 * (226 - 146) = 306
    sharp = apply(picture, "Sharpness", 2.0, saturate=saturate)
    assert sharp[1, 1].tolist() == [peak] * 3
    assert (sharp[0] == 96).all()


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_plain_picture_has_nothing_to_stretch(name):
    plain = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(apply(plain, name, 0.0), plain)


def test_the_same_generator_gives_the_same_picture(picture):
    first, second = (
        rand_augment(picture, num_ops=5, level=7, rng=np.random.default_rng(3)) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_no_operations_leave_the_picture(picture):
    assert rand_augment(picture, num_ops=0, level=7, rng=np.random.default_rng(0)) is picture


def test_half_of_the_drawn_operations_are_applied(monkeypatch, picture):
    applied = []
    monkeypatch.setattr(randaugment, "apply", lambda image, *_, **__: applied.append(1) or image)
    rand_augment(picture, num_ops=4000, level=7, rng=np.random.default_rng(0))
    assert len(applied) == pytest.approx(2000, abs=5 * np.sqrt(1000))
