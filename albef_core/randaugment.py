"""RandAugment with the published pre-training operations, on 8-bit RGB pixels (section 3.4).

Every operation gives the pixels of the published code under OpenCV 4.5.5, whichever is installed.
"""

from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float64, Int16, Int64, UInt8, UInt16

Image = UInt8[np.ndarray, "H W 3"]
"""Annotations only: the pixels that every operation takes and returns."""

OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
"""In the published order: a recorded random state draws them by position."""

_APPLIED_SHARE = 0.5
_FILL = (128, 128, 128)


def rand_augment(
    image: Image,
    *,
    num_ops: int,
    level: int,
    rng: np.random.Generator | np.random.RandomState,
    saturate: bool = True,
) -> Image:
    """Draw `num_ops` operations with replacement, then apply each with probability one half.

    `level` runs from 0 to 10. A `RandomState` replays the draws of the published code under numpy's
    legacy seed. With `saturate` 8-bit arithmetic stops at 0 and 255; without, it overflows in
    AutoContrast and Sharpness exactly as in the published code. The result may be `image` itself.
    """
    for name in rng.choice(OPERATIONS, num_ops):
        if rng.random() > _APPLIED_SHARE:
            continue
        image = apply(image, str(name), strength(str(name), level, rng), saturate=saturate)
    return image


def strength(name: str, level: int, rng: np.random.Generator | np.random.RandomState) -> float:
    """Translate a level into an operation's factor, pixels or degrees, the sign being drawn."""
    share = level / 10
    if name in ("Brightness", "Sharpness"):
        return share * 1.8 + 0.1
    if name not in _LARGEST:
        return 0.0
    size, coin = share * _LARGEST[name], rng.random()
    is_negative = coin < 0.5 if name == "Rotate" else coin > 0.5  # as published
    return -size if is_negative else size


_LARGEST = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 10, "TranslateY": 10, "Rotate": 30}


def apply(image: Image, name: str, amount: float, *, saturate: bool = True) -> Image:
    """Apply one operation by name; the three without an amount ignore it."""
    if name in _LARGEST:
        height, width = image.shape[:2]
        return _warp(image, *_sources(name, amount, height, width))
    match name:
        case "AutoContrast":
            return auto_contrast(image, saturate=saturate)
        case "Equalize":
            return equalize(image)
        case "Brightness":
            return brightness(image, amount)
        case "Sharpness":
            return sharpness(image, amount, saturate=saturate)
        case _:
            return image


def auto_contrast(image: Image, *, saturate: bool = True) -> Image:
    """Stretch each channel linearly to the whole range 0..255; a channel of one value stays.

    The published code negates the darkest value in 8 bits, so that a channel without a true black
    turns white throughout; `saturate=False` does the same.
    """
    tables = _unchanged_tables()
    for channel in range(3):
        low, high = np.flatnonzero(_histogram(image, channel))[[0, -1]]
        if low == high:
            continue
        start = -low if saturate or low == 0 else 256 - low
        scale = 255 / (high - low)
        tables[:, 0, channel] = (np.arange(256) * scale + start * scale).clip(0, 255)
    return cv2.LUT(image, tables)


def equalize(image: Image) -> Image:
    """Flatten each channel's histogram; a channel of too few values stays."""
    tables = _unchanged_tables()
    for channel in range(3):
        counts = _histogram(image, channel)
        brightest = np.flatnonzero(counts)[-1]
        step = counts[:brightest].sum() // 255
        if step == 0:
            continue
        darker = counts.cumsum() - counts
        tables[:, 0, channel] = ((darker + step // 2) // step).clip(0, 255)
    return cv2.LUT(image, tables)


def _histogram(image: Image, channel: int) -> Int64[np.ndarray, " 256"]:
    return cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)


def _unchanged_tables() -> UInt8[np.ndarray, "256 1 3"]:
    return np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 3)


def brightness(image: Image, factor: float) -> Image:
    """Multiply every pixel, 1 being unchanged."""
    return cv2.LUT(image, (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8))


def sharpness(image: Image, factor: float, *, saturate: bool = True) -> Image:
    """Move every pixel but the border away from (above 1) or towards its smoothed neighborhood.

    The published code lets results beyond 0..255 wrap round, so that the edge of a highlight gets
    black specks; `saturate=False` does the same.
    """
    if factor == 1:
        return image
    smooth = cv2.filter2D(image, -1, _SMOOTHING)
    if factor == 0:
        return smooth
    base = smooth.astype(np.float32)
    sharp = image - base
    sharp *= np.float32(factor)
    sharp += base
    # To wrap by way of int32, because the cast of a float below 0 to 8 bits is undefined.
    whole = np.clip(sharp, 0, 255, out=sharp) if saturate else sharp.astype(np.int32)
    result = whole.astype(np.uint8)
    result[[0, -1]] = image[[0, -1]]
    result[:, [0, -1]] = image[:, [0, -1]]
    return result


_SMOOTHING = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _warp(
    image: Image, whole: Int16[np.ndarray, "H W 2"], fraction: UInt16[np.ndarray, "H W"]
) -> Image:
    return cv2.remap(
        image,
        whole,
        fraction,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_FILL,
    )


@lru_cache(maxsize=32)
def _sources(
    name: str, amount: float, height: int, width: int
) -> tuple[Int16[np.ndarray, "H W 2"], UInt16[np.ndarray, "H W"]]:
    """For every pixel of the result, where it comes from: whole pixels, and 32nds of a pixel.

    OpenCV 5 computes the positions of `warpAffine` in floating point, 4.5.5 in this fixed point
    (up to 3 gray levels apart on the recorded picture). `remap` accepts the latter, and a level has
    only two amounts per operation, so the positions are computed once.
    """
    inverse = cv2.invertAffineTransform(_matrix(name, amount, height, width))
    columns, rows = np.arange(width), np.arange(height)[:, None]
    x, y = (
        (np.rint(by_x * columns * 1024) + np.rint((by_y * rows + shift) * 1024) + 16).astype(int)
        >> 5
        for by_x, by_y, shift in inverse
    )
    whole = np.stack([x >> 5, y >> 5], axis=-1).clip(-32768, 32767).astype(np.int16)
    return whole, ((y & 31) * 32 + (x & 31)).astype(np.uint16)


def _matrix(name: str, amount: float, height: int, width: int) -> Float64[np.ndarray, "2 3"]:
    """Map the picture to the result, shears in float32 precision as in the published code."""
    if name == "Rotate":
        return cv2.getRotationMatrix2D((width / 2, height / 2), amount, 1)
    entry, value = {
        "ShearX": ((0, 1), amount),
        "ShearY": ((1, 0), amount),
        "TranslateX": ((0, 2), -amount),
        "TranslateY": ((1, 2), -amount),
    }[name]
    matrix = np.eye(2, 3)
    matrix[entry] = np.float32(value)
    return matrix
