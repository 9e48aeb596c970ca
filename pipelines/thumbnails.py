"""Small copies of pictures, to stand inside a page."""

import base64

import cv2
import numpy as np

from albef_core.preprocess import decode_image

SHEET_PX = 180


def thumbnail(encoded: bytes) -> str:
    """Shrink a picture to `SHEET_PX` at most, as the text of a JPEG's data URL.

    Raises:
        UndecodableImage: it is none.
    """
    pixels = decode_image(encoded)
    scale = SHEET_PX / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    _ok, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]))
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode('ascii')}"
