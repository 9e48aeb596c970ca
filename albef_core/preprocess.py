"""Image bytes to the pixels that a model sees: decoding, crop, flip, resize (section 3.4)."""

import math
from io import BytesIO

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from albef_core.randaugment import rand_augment

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue on a scale of 0 to 1, as the published code normalizes (CLIP's)."""

STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of red, green and blue on a scale of 0 to 1."""

MAX_PIXELS = 2**26
"""A picture with more is refused before it is decoded: 67 megapixels take 200 MB as RGB."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_CROP_TRIES = 10
_CROP_RATIOS = (3 / 4, 4 / 3)


class UndecodableImage(ValueError):  # noqa: N818  (an image that cannot be used, not a failure of ours)
    """The bytes are no whole JPEG, PNG, WebP or GIF of a bearable size; the message says why."""


def decode_image(encoded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Decode a picture to upright RGB: the first frame, transparency on white, 16 bits scaled to 8.

    Raises:
        UndecodableImage: The bytes are cut off, damaged, of another format, or have more than
            `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(BytesIO(encoded), formats=_FORMATS) as image:
            _refuse_huge(image)
            return upright_rgb(image)
    except Exception as error:  # Pillow's readers raise anything from SyntaxError to struct.error
        raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Turn an opened picture upright, put transparency on white, and scale 16 bits to 8."""
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def _refuse_huge(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray, which Pillow would clip. It cuts 16-bit color to the high byte: so do we.
        high_byte = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return image.convert("RGB")


def resize_square(
    image: UInt8[np.ndarray, "H W 3"], size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resize to a square whatever the shape: the published transform of evaluation."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def random_resized_crop(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    size: int,
    scale_min: float,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Cut out a random rectangle and resize it to a square.

    The rectangle keeps a uniform share of the area between `scale_min` and 1, at a ratio of sides
    log-uniform between 3:4 and 4:3. Where ten draws do not fit, it is the largest central
    rectangle of a ratio between these.
    """
    top, left, height, width = _crop_box(image.shape[0], image.shape[1], scale_min, rng)
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    return resize_square(crop, size)


def _crop_box(
    height: int, width: int, scale_min: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a crop."""
    low, high = _CROP_RATIOS
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(scale_min, 1)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    h = min(height, max(1, round(width / low)))
    w = min(width, max(1, round(height * high)))
    return (height - h) // 2, (width - w) // 2, h, w


def augment(
    image: UInt8[np.ndarray, "H W 3"],
    *,
    size: int,
    crop_scale_min: float,
    flip: bool,
    rand_ops: int,
    rand_level: int,
    rng: np.random.Generator,
    saturate: bool = True,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Change a training picture as published: random crop, mirror half of them, RandAugment.

    Every draw comes from `rng`, so a generator keyed by the pair gives the same picture wherever it
    is prepared. `saturate` is explained at `rand_augment`.
    """
    image = random_resized_crop(image, size=size, scale_min=crop_scale_min, rng=rng)
    if flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    return rand_augment(image, num_ops=rand_ops, level=rand_level, rng=rng, saturate=saturate)
