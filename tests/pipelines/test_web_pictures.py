import hashlib
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image

from albef_core.preprocess import decode_image
from pipelines.crawl_config import Resize
from pipelines.perceptual_hash import perceptual_hash
from pipelines.web_pictures import BadPictureError, PictureSpec, make_picture


def spec(resize: Resize = "keep_ratio", size: int = 64) -> PictureSpec:
    return PictureSpec(resize=resize, image_size=size, jpeg_quality=95, min_side=16)


def scene(width: int, height: int) -> Image.Image:
    """Draw a smooth picture: blue grows to the right, red downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([y, 0 * x + 90, x], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("resize", "size", "stored"),
    [
        ("keep_ratio", (200, 100), (128, 64)),
        ("keep_ratio", (100, 200), (64, 128)),
        ("keep_ratio", (2000, 1000), (128, 64)),
        ("border", (200, 100), (64, 64)),
        ("border", (40, 30), (64, 64)),
        ("center_crop", (200, 100), (64, 64)),
        ("center_crop", (90, 40), (40, 40)),
        ("none", (200, 100), (200, 100)),
    ],
)
def test_sizes_are_as_asked_for_and_nothing_is_made_larger(
    resize: Resize, size: tuple[int, int], stored: tuple[int, int]
) -> None:
    made = make_picture(encoded(scene(*size)), spec(resize))

    assert (made.width, made.height) == stored
    assert decode_image(made.image).shape[1::-1] == stored
    assert (made.original_width, made.original_height) == size
    assert made.sha256 == hashlib.sha256(made.image).digest()


def test_a_border_is_white_and_a_crop_is_the_middle() -> None:
    body = encoded(scene(200, 100))

    border = decode_image(make_picture(body, spec("border")).image)
    crop = decode_image(make_picture(body, spec("center_crop")).image)

    assert border[:14].min() > 240
    assert border[-14:].min() > 240
    assert abs(int(crop[32, 0, 2]) - 64) < 8
    assert abs(int(crop[32, -1, 2]) - 191) < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_needs_no_resize_is_stored_byte_for_byte(kind: str) -> None:
    body = encoded(scene(90, 60), kind)

    made = make_picture(body, spec())

    assert made.image == body
    assert made.phash == perceptual_hash(decode_image(body))


@pytest.mark.parametrize("turn", range(2, 9))
def test_orientation_is_applied_and_metadata_goes(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = turn, "Camera"
    body = encoded(scene(90, 60), exif=exif)

    made = make_picture(body, spec())

    assert made.image != body
    assert b"Camera" not in made.image
    expected = decode_image(body).astype(int)
    assert (made.height, made.width) == expected.shape[:2]
    assert (made.original_height, made.original_width) == expected.shape[:2]
    assert np.abs(decode_image(made.image) - expected).max() < 12


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (encoded(scene(200, 100).convert("CMYK")), (128, 64)),
        (encoded(scene(200, 100).convert("L")), (128, 64)),
        (encoded(scene(200, 100).quantize(64), "PNG"), (128, 64)),
        (
            encoded(scene(60, 40), "GIF", save_all=True, append_images=[scene(60, 40).rotate(180)]),
            (60, 40),
        ),
        (
            encoded(
                scene(60, 40), "WEBP", save_all=True, append_images=[scene(60, 40).rotate(180)]
            ),
            (60, 40),
        ),
        (encoded(scene(200, 100), "AVIF"), (128, 64)),
    ],
    ids=["cmyk", "gray", "palette", "animated gif", "animated webp", "avif"],
)
def test_other_kinds_become_plain_jpegs(body: bytes, size: tuple[int, int]) -> None:
    made = make_picture(body, spec())

    assert (made.width, made.height) == size
    assert made.image.startswith(b"\xff\xd8\xff")


def test_transparency_lies_on_white_and_16_bits_become_8() -> None:
    clear = scene(200, 100)
    clear.putalpha(0)
    deep = cv2.imencode(".png", np.full((100, 100, 3), 0x80FF, dtype=np.uint16))[1].tobytes()

    assert decode_image(make_picture(encoded(clear, "PNG"), spec()).image).min() > 250
    assert abs(int(decode_image(make_picture(deep, spec()).image).mean()) - 0x80) < 3


def test_a_jpeg_that_is_decoded_small_looks_as_one_that_is_decoded_whole() -> None:
    body = encoded(scene(1600, 1200), quality=95)
    whole = cv2.resize(decode_image(body), (85, 64), interpolation=cv2.INTER_AREA).astype(int)

    small = decode_image(make_picture(body, spec()).image)

    assert np.abs(small - whole).mean() < 2


def test_bombs_are_refused_before_they_are_decoded() -> None:
    header = encoded(Image.new("L", (16, 16)), "PNG")
    for side in (9000, 11000, 50_000):
        chunk = b"IHDR" + side.to_bytes(4, "big") * 2 + header[24:29]
        bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:]
        with pytest.raises(BadPictureError) as refusal:
            make_picture(bomb, spec())
        assert refusal.value.failure == "too many pixels"


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b"", "not an image"),
        (b"<!doctype html><p>Gone", "not an image"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        (b"BM" + bytes(60), "not an image"),
        (encoded(scene(200, 100))[:900], "corrupt"),
        (encoded(scene(200, 100))[:-20], "corrupt"),
        (encoded(scene(200, 100), "PNG")[:-200], "corrupt"),
        (b"\xff\xd8\xff" + bytes(500), "corrupt"),
        (encoded(scene(8, 100)), "too small"),
    ],
)
def test_what_is_no_picture_ends_in_its_class(body: bytes, failure: str) -> None:
    with pytest.raises(BadPictureError) as refusal:
        make_picture(body, spec())

    assert refusal.value.failure == failure
    assert str(refusal.value).isascii()
