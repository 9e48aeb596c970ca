"""Every way in which a row of a crawl can end without a picture: its class, and what it means."""

from dataclasses import dataclass

from albef_core.errors import InputError
from pipelines.crawl_store import FAILED, REFUSED

DNS = "dns"
CONNECT = "connect"
TLS = "tls"
TIMEOUT_CONNECT = "timeout connect"
TIMEOUT_FIRST_BYTE = "timeout first byte"
TIMEOUT_TRANSFER = "timeout transfer"
DISCONNECTED = "disconnected"
TRUNCATED = "truncated"
BAD_ANSWER = "bad answer"
BAD_REDIRECT = "bad redirect"
TOO_LARGE = "too large"
TOO_MANY_PIXELS = "too many pixels"
TOO_SMALL = "too small"
NOT_AN_IMAGE = "not an image"
CORRUPT = "corrupt"
ROBOTS = "robots"
ROBOTS_UNREACHABLE = "robots unreachable"
OPT_OUT = "opt-out"
PRIVATE_ADDRESS = "private address"
SCHEME = "scheme"
MALFORMED_ROW = "malformed row"
HTTP = "http "
"""Followed by the code of the answer."""
RATE_LIMITED = f"{HTTP}429"

TRANSIENT, EVERY = "transient", "all"
"""What `--retry` takes besides classes."""
TRANSIENT_CODES = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})


@dataclass(frozen=True)
class Failure:
    """What a class says of a row."""

    meaning: str
    is_transient: bool = False
    """Whether the same URL may give a picture another time."""
    state: str = FAILED


FAILURES = {
    DNS: Failure("the name of the host does not resolve", True),
    CONNECT: Failure("the host takes no connection", True),
    TLS: Failure("no TLS connection that can be trusted", True),
    TIMEOUT_CONNECT: Failure("no connection within --connect-timeout-s", True),
    TIMEOUT_FIRST_BYTE: Failure("no answer within --first-byte-timeout-s", True),
    TIMEOUT_TRANSFER: Failure("not all of it within --transfer-timeout-s", True),
    DISCONNECTED: Failure("the connection broke before an answer", True),
    TRUNCATED: Failure("the connection broke within the body", True),
    BAD_ANSWER: Failure("what came is not HTTP, or damaged on its way"),
    BAD_REDIRECT: Failure("a redirect without an aim, or more than --max-redirects"),
    TOO_LARGE: Failure("the body is longer than --max-bytes, as sent or unpacked"),
    TOO_MANY_PIXELS: Failure("the picture has more pixels than are decoded"),
    TOO_SMALL: Failure("the shorter side is below --min-side"),
    NOT_AN_IMAGE: Failure("the bytes are no JPEG, PNG, WebP, GIF or AVIF"),
    CORRUPT: Failure("a picture that does not decode"),
    ROBOTS: Failure("robots.txt forbids it", state=REFUSED),
    ROBOTS_UNREACHABLE: Failure("robots.txt cannot be had, which forbids all", True, REFUSED),
    OPT_OUT: Failure("the answer's headers reserve the picture", state=REFUSED),
    PRIVATE_ADDRESS: Failure("it leads to an address that is not public", state=REFUSED),
    SCHEME: Failure("it leads to something else than http or https", state=REFUSED),
    MALFORMED_ROW: Failure("the row of the list holds no URL, or is damaged"),
}
UNREACHABLE = frozenset({DNS, CONNECT, TLS, TIMEOUT_CONNECT, ROBOTS_UNREACHABLE})
"""Classes that say something of the host, and of all of its URLs."""
UNANSWERED = frozenset({TIMEOUT_FIRST_BYTE, TIMEOUT_TRANSFER, DISCONNECTED})
"""Classes that do so when many URLs in a row end with them."""


def http_failure(code: int) -> str:
    """Name the class of an answer that is no picture."""
    return f"{HTTP}{code}"


def find_failure(name: str) -> Failure:
    """Look a class up, those of HTTP codes included.

    Raises:
        KeyError: there is no such class.
    """
    code = name.removeprefix(HTTP)
    if code != name and code.isdigit() and len(code) == 3:
        return Failure(f"the server answered {code}", int(code) in TRANSIENT_CODES)
    return FAILURES[name]


def is_retried(failure: str, retry: tuple[str, ...]) -> bool:
    """Tell whether `--retry` asks for rows of this class."""
    if EVERY in retry or failure in retry:
        return True
    return TRANSIENT in retry and find_failure(failure).is_transient


def check_retry(retry: tuple[str, ...]) -> None:
    """Refuse a `--retry` that names no class.

    Raises:
        InputError: it does.
    """
    for name in retry:
        try:
            if name not in (TRANSIENT, EVERY):
                find_failure(name)
        except KeyError:
            classes = ", ".join(FAILURES)
            raise InputError(
                f'--retry {name!r}: no such class. There are: transient, all, "http CODE",'
                f" {classes}."
            ) from None
