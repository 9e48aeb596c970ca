"""A hash of what a picture looks like."""

import cv2
import numpy as np


def perceptual_hash(pixels: np.ndarray) -> int:
    """Hash what a uint8 RGB picture looks like: near-duplicates differ in few of the 64 bits.

    One bit for each of the lowest 8 x 8 frequencies of the 32 x 32 gray picture: is it above the
    median? (Zauner 2010, "pHash", section 3.2.1.)
    """
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.partition(low[1:], 31)[31]  # the median, without the mean of the picture
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
