"""The answers of a fault server that are well made: which body, status and headers a URL gets."""

import gzip

from aiohttp import web

from pipelines import fault_bodies as bodies
from pipelines.fault_bodies import Size
from pipelines.shapes import shapes_picture

SHAPES = "shapes"
"""`/shapes-SEED/NUMBER.png` is a picture of the generated set."""
CONTENT_TYPES = {SHAPES: "image/png", "mislabeled": "text/plain", "svg": "image/svg+xml"}
"""What is not said to be a JPEG."""
RETRY_AFTER_S = 1
MAX_REDIRECTS = 3
"""... of `redirect`, which ends well."""
HOPS = 7
"""Redirects of `hops`, which are more than a crawler should follow."""
OPT_OUTS = {
    "noai": ("X-Robots-Tag", "noai"),
    "noimageai": ("X-Robots-Tag", "noimageai"),
    "noindex": ("X-Robots-Tag", "noindex"),
    "noimageindex": ("X-Robots-Tag", "noimageindex"),
    "noai-mixed": ("X-Robots-Tag", "NoFollow, NoAI"),
    "noai-us": ("X-Robots-Tag", "albef-crawler: noai"),
    "noai-other": ("X-Robots-Tag", "otherbot: noai"),
    "tdm-1": ("tdm-reservation", "1"),
    "tdm-0": ("tdm-reservation", "0"),
}
AIMS = {
    "to-file": "file:///etc/passwd",
    "to-ftp": "ftp://127.0.0.1/picture.jpg",
    "to-private": "http://10.0.0.1/picture.jpg",
    "to-metadata": "http://169.254.169.254/latest/meta-data/",
}
OF_HALF_SIZE = frozenset(
    {"small", "cmyk", "webp", "avif", "gif", "rotated", "alpha", "deep", "palette"}
)
"""Pictures that a crawler need not resize."""
ENCODED_ANEW = frozenset({"avif", "gif", "rotated"})
"""Pictures that are never stored as they came."""
ROBOTS = (
    "User-agent: *\nDisallow: /forbidden/\n\n"
    "User-agent: albef-crawler\nDisallow: /forbidden/\nDisallow: /forbidden-to-us/\n"
)
FORBID_ALL = "User-agent: *\nDisallow: /\n"
HUGE_LINES = 180_000
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300"/>'
HTML = b"<!doctype html>\n<html><title>Gone</title><p>This picture is no longer here.</html>"


def robots_txt(kind: str, *, is_moved: bool) -> web.Response:
    """Give robots.txt of a host that has the fault `kind`; empty: of any other host."""
    match kind:
        case "robots-404":
            return web.Response(status=404)
        case "robots-500":
            return web.Response(status=500)
        case "robots-huge":
            return web.Response(text=FORBID_ALL + "# and so on\n" * HUGE_LINES)
        case "robots-moved" if not is_moved:
            return web.Response(status=301, headers={"Location": "/moved/robots.txt"})
        case "robots-all" | "robots-moved":
            return web.Response(text=FORBID_ALL)
    return web.Response(text=ROBOTS)


def answer(kind: str, name: str, size: Size, *, times: int, age_s: float) -> web.Response:
    """Give what a URL of the fault `kind` says.

    `name` is the last part of its path; it is asked for the `times`-th time, `age_s` seconds after
    the first.
    """
    number, hop = number_and_hop(name)
    what, _, code = kind.partition("-")
    if what == "status" or (what == "heals" and times <= 1 + number % 2):
        return web.Response(status=int(code))
    if kind == "throttled" and age_s < RETRY_AFTER_S:
        return web.Response(status=429, headers={"Retry-After": str(RETRY_AFTER_S)})
    if aim := AIMS.get(kind) or _next_hop(kind, number, hop):
        return web.Response(status=302, headers={"Location": aim})
    headers = {"Content-Type": CONTENT_TYPES.get(what, "image/jpeg")}
    body = body_of(kind, number, size)
    match kind:
        case "gzipped":
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        case "bomb":
            headers["Content-Encoding"] = "gzip"
        case opt_out if opt_out in OPT_OUTS:
            header, value = OPT_OUTS[opt_out]
            headers[header] = value
    response = web.Response(body=body, headers=headers)
    if kind == "chunked":
        response.enable_chunked_encoding()
    return response


def body_of(kind: str, number: int, size: Size) -> bytes:
    """Give the body that a URL ends with, unpacked; a JPEG of `size` unless the fault says so."""
    what, _, seed = kind.partition("-")
    if what == SHAPES:
        return shapes_picture(int(seed), number).encoded
    if kind == "small":
        return bodies.jpeg(number, bodies.half(size))
    if kind in OF_HALF_SIZE or kind == "tiny":
        return bodies.odd_picture(kind, number, bodies.half(size))
    match kind:
        case "pixels":
            return bodies.huge_png()
        case "bomb":
            return bodies.gzip_bomb()
        case "noise":
            return bodies.noise(20_000)
        case "html":
            return HTML
        case "svg":
            return SVG
        case "empty":
            return b""
    whole = bodies.jpeg(number, size)
    return whole[: len(whole) // 2] if kind == "half" else whole


def number_and_hop(name: str) -> tuple[int, int]:
    """Read `17.jpg` or `17.png`, or `17-2.jpg` behind two redirects.

    Letters before the number are passed by.

    Raises:
        ValueError: there is no number.
    """
    number, _, hop = name.rpartition("_")[2].partition(".")[0].partition("-")
    return int(number), int(hop or 0)


def _next_hop(kind: str, number: int, hop: int) -> str:
    """Tell where a chain of redirects goes on; empty: it ends here."""
    if kind == "loop":
        return f"/loop/{number}.jpg"
    length = {"hops": HOPS, "redirect": 1 + number % MAX_REDIRECTS}.get(kind, 0)
    return f"/{kind}/{number}-{hop + 1}.jpg" if hop < length else ""
