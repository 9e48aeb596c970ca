import hashlib
import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.fault_bodies import BOMB_MIB, MIB, gzip_bomb, huge_png, jpeg, odd_picture
from pipelines.perceptual_hash import perceptual_hash


def test_every_number_has_a_jpeg_of_its_own() -> None:
    files = [jpeg(number, (160, 120)) for number in range(300)]
    pixels = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) for file in files]

    assert files[7] == jpeg(7, (160, 120))
    assert {one.shape for one in pixels} == {(120, 160, 3)}
    assert len({hashlib.sha256(file).digest() for file in files}) == 300
    assert len({perceptual_hash(one) for one in pixels}) > 290


def test_a_jpeg_of_the_usual_size_is_about_as_large_as_a_photograph() -> None:
    assert 50_000 < np.mean([len(jpeg(number, (500, 375))) for number in range(20)]) < 100_000


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("cmyk", ("JPEG", "CMYK", 1)),
        ("webp", ("WEBP", "RGB", 1)),
        ("avif", ("AVIF", "RGB", 1)),
        ("gif", ("GIF", "P", 3)),
        ("rotated", ("JPEG", "RGB", 1)),
        ("alpha", ("PNG", "RGBA", 1)),
        ("deep", ("PNG", "RGB", 1)),
        ("palette", ("PNG", "P", 1)),
    ],
)
def test_odd_pictures_are_what_they_are_called(kind: str, what: tuple[str, str, int]) -> None:
    with Image.open(io.BytesIO(odd_picture(kind, 1, (80, 60)))) as image:
        image.load()

        assert (image.format, image.mode, getattr(image, "n_frames", 1)) == what
        assert image.size == (80, 60)
        assert image.getexif().get(0x0112, 1) == (6 if kind == "rotated" else 1)


def test_deep_pngs_have_16_bits_a_channel() -> None:
    assert odd_picture("deep", 0, (8, 8))[24] == 16  # of the header, W3C PNG section 11.2.1


def test_the_bomb_unpacks_to_a_thousand_times_its_size() -> None:
    inflate, bomb, total = zlib.decompressobj(wbits=31), gzip_bomb(), 0
    for place in range(0, len(bomb) // 16, 4096):  # a sixteenth shows it
        total += len(inflate.decompress(bomb[place : place + 4096]))

    assert len(bomb) < 1.1 * MIB
    assert total > 0.99 * BOMB_MIB * MIB / 16


def test_the_huge_picture_says_how_large_it_is_and_is_small() -> None:
    png = huge_png()

    assert len(png) < 3 * MIB
    assert png[16:24] == (50_000).to_bytes(4) * 2
    assert png[-8:-4] == b"IEND"
