import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from albef_core.preprocess import (
    MAX_PIXELS,
    MEAN,
    STD,
    UndecodableImage,
    augment,
    decode_image,
    random_resized_crop,
    resize_square,
)
from tests.golden_folder import GOLDEN, needs_golden

FOLDER = GOLDEN / "image_transforms"
ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 8, columns * 7, (rows + columns) * 4], axis=-1).astype(np.uint8)


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that announces its size and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def transform_cases() -> list[str]:
    file = FOLDER / "cases.json"
    names = json.loads(file.read_text()) if file.exists() else []
    return [name for name in names if name.startswith("test_transform_")]


@needs_golden
@pytest.mark.parametrize("case", transform_cases())
def test_the_evaluation_transform_gives_the_recorded_numbers(case):
    settings = json.loads((FOLDER / "cases.json").read_text())
    pixels, number = load_file(FOLDER / "tensors.safetensors"), case.removeprefix("test_transform_")
    resized = resize_square(pixels[f"test_transform_in{number}"], settings[case]["image_res"])
    normalized = (resized / 255 - np.array(MEAN)) / np.array(STD)
    recorded = pixels[f"test_transform_out{number}"].transpose(1, 2, 0)
    # 1e-6: the recording is in float32. One gray level would be 0.014.
    np.testing.assert_allclose(normalized, recorded, atol=1e-6)


@needs_golden
def test_mean_and_deviation_are_the_recorded_ones():
    settings = json.loads((FOLDER / "cases.json").read_text())
    assert (list(MEAN), list(STD)) == (settings["mean"], settings["std"])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_lossless_picture_decodes_to_its_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(Image.fromarray(gradient()), kind, **options)
    np.testing.assert_array_equal(decode_image(encoded), gradient())


def test_a_truncated_jpeg_is_refused():
    encoded = encode(Image.fromarray(gradient(200, 200)), "JPEG")
    with pytest.raises(UndecodableImage, match="truncated"):
        decode_image(encoded[: len(encoded) // 2])


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "UnidentifiedImageError"),
        (b"<html><body>404 Not Found</body></html>", "UnidentifiedImageError"),
        (b"\xff\xd8\xff\xe0", "Error"),
        (png_header_only(10, 10), "truncated"),
    ],
    ids=["nothing", "HTML", "JPEG magic", "PNG header"],
)
def test_foreign_bytes_are_refused_with_the_reason(encoded, reason):
    with pytest.raises(UndecodableImage, match=reason):
        decode_image(encoded)


@settings(deadline=None)  # other processes share the cores
@given(
    encoded=st.binary(max_size=200), magic=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
)
def test_random_bytes_are_refused_and_nothing_else_is_raised(encoded, magic):
    with pytest.raises(UndecodableImage):
        decode_image(magic + encoded)


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS // 1024 + 1, 1024), (50000, 50000)])
def test_a_decompression_bomb_is_refused_by_its_header(width, height):
    with pytest.raises(UndecodableImage, match="DecompressionBomb"):
        decode_image(png_header_only(width, height))


def test_a_picture_of_one_pixel_becomes_a_plain_square():
    image = decode_image(encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"))
    assert image.tolist() == [[[10, 20, 30]]]
    crop = random_resized_crop(image, size=8, scale_min=0.2, rng=np.random.default_rng(0))
    assert (crop == [10, 20, 30]).all()


def test_a_cmyk_jpeg_becomes_rgb():
    encoded = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red = decode_image(encoded)
    assert red.shape == (16, 16, 3)
    np.testing.assert_allclose(red.astype(int), np.full((16, 16, 3), [255, 0, 0]), atol=3)


def test_a_16_bit_png_is_scaled_and_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (decoded == decoded[..., :1]).all()


def test_an_animated_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(encoded) == [255, 0, 0]).all()


def test_a_transparent_palette_color_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    decoded = decode_image(encode(image, "PNG", transparency=0))
    assert decoded.tolist() == [[[255, 255, 255], [0, 0, 200]]]


def test_half_transparent_black_becomes_gray_on_white():
    decoded = decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert decoded.tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_gray_and_bilevel_pictures_have_three_equal_channels(mode):
    decoded = decode_image(encode(Image.fromarray(gradient()).convert(mode), "PNG"))
    assert decoded.shape == (24, 32, 3)
    assert (decoded == decoded[..., :1]).all()


def test_a_rotated_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    encoded = encode(Image.fromarray(gradient()), "JPEG", exif=exif, quality=100, subsampling=0)
    upright = np.rot90(gradient(), k=-1).astype(int)
    np.testing.assert_allclose(decode_image(encoded).astype(int), upright, atol=6)


def test_a_damaged_exif_block_does_not_cost_the_photograph():
    encoded = encode(Image.fromarray(gradient()), "JPEG", exif=b"Exif\x00\x00neither II nor MM")
    assert decode_image(encoded).shape == (24, 32, 3)


@settings(deadline=None)  # other processes share the cores
@given(seed=st.integers(0, 1000))
def test_a_square_picture_cropped_to_its_whole_area_is_only_resized(seed):
    image = gradient(32, 32)
    options = {"crop_scale_min": 1.0, "flip": False, "rand_ops": 0, "rand_level": 7}
    result = augment(image, size=16, rng=np.random.default_rng(seed), **options)
    np.testing.assert_array_equal(result, resize_square(image, 16))


@settings(deadline=None)  # other processes share the cores
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    scale_min=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_a_crop_of_any_picture_is_a_square_of_its_colors(height, width, scale_min, seed):
    image = np.full((height, width, 3), [40, 90, 200], np.uint8)
    crop = random_resized_crop(image, size=8, scale_min=scale_min, rng=np.random.default_rng(seed))
    assert crop.shape == (8, 8, 3)
    assert (crop == [40, 90, 200]).all()


def test_a_long_strip_falls_back_to_a_central_crop_of_four_by_three():
    strip = np.zeros((30, 3000, 3), np.uint8)
    strip[:, 1480:1520] = 255  # the middle 40 columns: 30 * 4 / 3
    crop = random_resized_crop(strip, size=8, scale_min=1.0, rng=np.random.default_rng(0))
    assert (crop == 255).all()


def test_crops_keep_the_share_of_area_that_was_asked_for():
    # A ramp's range tells how much of the width a crop kept; its area is at least a half.
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    rng = np.random.default_rng(0)
    shares = [
        np.ptp(random_resized_crop(ramp, size=200, scale_min=0.5, rng=rng)) / 200 for _ in range(50)
    ]
    assert min(shares) >= np.sqrt(0.5 * 3 / 4) - 0.02
    assert max(shares) > 0.9


@pytest.mark.parametrize(("flip", "mirrored"), [(True, 100), (False, 0)])
def test_half_of_the_pictures_are_mirrored_when_flip_is_on(flip, mirrored):
    image, rng = gradient(32, 32), np.random.default_rng(0)
    results = [
        augment(image, size=32, crop_scale_min=1.0, flip=flip, rand_ops=0, rand_level=7, rng=rng)
        for _ in range(200)
    ]
    count = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert abs(count - mirrored) <= (30 if flip else 0)


def test_the_same_generator_gives_the_same_picture():
    options = {"crop_scale_min": 0.2, "flip": True, "rand_ops": 2, "rand_level": 7}
    first, second, other = (
        augment(gradient(), size=16, rng=np.random.default_rng(seed), **options)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.uint8
    assert not np.array_equal(first, other)


def test_the_modules_of_data_tasks_do_not_import_torch():
    code = (
        "import albef_core.preprocess, albef_core.tokenizer, albef_core.captions\n"
        "import albef_core.masking, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
