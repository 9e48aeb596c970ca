"""What a fault server sends: pictures that depend on their number alone, and bodies that harm."""

import io
import random
import re
import struct
import zlib
from functools import cache
from itertools import pairwise

import cv2
import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""
POOL = 24
"""JPEGs that are drawn and encoded; the others are made of their bands."""
ODD_POOL = 16
"""Pictures of each other kind; AVIF takes a tenth of a second to encode."""
BAND_ROWS = 3
"""Rows of 16 pixels in a band."""
QUALITY = 91
"""With it a JPEG of 500 x 375 has some 70 KB, about as web photographs have."""
MIB = 1 << 20
BOMB_MIB = 1024
"""What the gzip bomb unpacks to."""
HUGE_SIDE = 50_000
OCTREE = Image.Quantize.FASTOCTREE
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_GRIDS = (3, 6, 12, 25, 50, 100)


def half(size: Size) -> Size:
    """Give the size of odd pictures and of those that need no resize."""
    return size[0] // 2, size[1] // 2


def pixels(number: int, size: Size) -> np.ndarray:
    """Draw picture `number` in BGR: noise that is weaker the finer it is, as in photographs."""
    rng = np.random.default_rng(number)
    drawn = np.zeros((_GRIDS[0], _GRIDS[0], 3), np.float32)
    for side in _GRIDS:
        drawn = cv2.resize(drawn, (side, side), interpolation=cv2.INTER_CUBIC)
        drawn += rng.standard_normal((side, side, 3), np.float32) * (90 / side**0.6)
    drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_LINEAR) + 128
    drawn += rng.standard_normal((size[1], size[0], 1), np.float32) * 7
    return np.clip(drawn, 0, 255).astype(np.uint8)


def jpeg(number: int, size: Size) -> bytes:
    """Give JPEG `number`, in microseconds.

    Its bands are those of pictures from a pool: with restart markers (ITU T.81, E.1.4), rows of
    blocks can be put together as they are. A comment has the number, so no two files are equal.
    """
    pool = _pool(size)
    dice = random.Random(number)
    head, rows = pool[0]
    chosen = [dice.randrange(POOL) for _ in range(0, len(rows), BAND_ROWS)]
    body = b"".join(pool[chosen[row // BAND_ROWS]][1][row] for row in range(len(rows)))
    comment = str(number).encode()
    segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
    return head[:2] + segment + head[2:] + body


@cache
def _pool(size: Size) -> list[tuple[bytes, list[bytes]]]:
    """Give what stands before the scan of each picture, and the scan in rows of blocks."""
    blocks_a_row = -(-size[0] // 16)
    flags = [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_RST_INTERVAL, blocks_a_row]
    pool = []
    for number in range(POOL):
        encoded = cv2.imencode(".jpg", pixels(number, size), flags)[1].tobytes()
        start = encoded.index(b"\xff\xda")
        start += 2 + int.from_bytes(encoded[start + 2 : start + 4])
        cuts = [start, *(m.end() for m in _RESTART.finditer(encoded, start)), len(encoded)]
        rows = [encoded[a:b] for a, b in pairwise(cuts)]
        pool.append((encoded[:start], rows))
    return pool


def odd_picture(kind: str, number: int, size: Size) -> bytes:
    """Encode a picture in another way, one of `ODD_POOL`: `cmyk`, `webp`, `avif`, `gif`, ..."""
    return _odd_picture(kind, number % ODD_POOL, size)


@cache
def _odd_picture(kind: str, number: int, size: Size) -> bytes:
    drawn = pixels(number, size)
    image = Image.fromarray(drawn)
    out = io.BytesIO()
    match kind:
        case "cmyk":
            image.convert("CMYK").save(out, "JPEG", quality=QUALITY)
        case "webp" | "avif":
            image.save(out, kind, quality=80, speed=10)
        case "gif":
            turned = [image.rotate(angle).quantize(64, OCTREE) for angle in (0, 90, 180)]
            turned[0].save(out, "GIF", save_all=True, append_images=turned[1:], duration=100)
        case "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees clockwise
            image.save(out, "JPEG", quality=QUALITY, exif=exif)
        case "alpha":
            image.putalpha(128)
            image.save(out, "PNG", compress_level=1)
        case "deep":
            out.write(cv2.imencode(".png", drawn.astype(np.uint16) * 257)[1].tobytes())
        case "tiny":
            image.resize((1, 1)).save(out, "GIF")
        case "palette":
            image.quantize(64, OCTREE).save(out, "PNG", compress_level=1)
    return out.getvalue()


@cache
def noise(num_bytes: int) -> bytes:
    """Begin as a JPEG does, and go on at random."""
    return b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + random.Random(0).randbytes(num_bytes)


@cache
def _zeros() -> bytes:
    """Deflate a MiB of zeros so that copies may follow each other (full flush, RFC 1951)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)


@cache
def gzip_bomb() -> bytes:
    """Pack `BOMB_MIB` of zeros into a thousandth; who unpacks it all misses a checksum."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + _zeros() * BOMB_MIB + b"\x03\0"


@cache
def huge_png() -> bytes:
    """Make a valid gray PNG of 50,000 x 50,000 that nobody ever held unpacked."""
    whole, rest = divmod(HUGE_SIDE * (HUGE_SIDE + 1), MIB)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    # The Adler-32 sum of n zeros (RFC 1950): 1 in the lower half, n modulo 65521 in the upper.
    total = (HUGE_SIDE * (HUGE_SIDE + 1) % 65521) << 16 | 1
    packed = b"\x78\xda" + _zeros() * whole + packer.compress(bytes(rest)) + packer.flush()
    header = struct.pack(">IIBBBBB", HUGE_SIDE, HUGE_SIDE, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", packed + struct.pack(">I", total)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in chunks)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
