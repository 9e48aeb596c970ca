"""The faults of a fault server: what it does, how often, and what a ledger must say of each."""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipelines import crawl_failures as classes
from pipelines.crawl_store import DUPLICATE, FAILED, OK, REFUSED

PICTURE = "picture"
"""Name of what is no fault: a JPEG, served at once."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way in which a URL is not just a picture."""

    name: str
    """First part of its path, as in `/html/17.jpg`."""
    does: str
    """What the server does, or what the list says."""
    state: str = OK
    """State of the row in the ledger."""
    failure: str | None = None
    """Class in the ledger, of failed and refused rows."""
    or_failure: str | None = None
    """Another class that it gets where packets come in other pieces."""
    is_retried: bool | None = False
    """Whether it takes more than one attempt; None: that depends on what else is known of the
    host."""
    weight: int = 2
    """How often a list has it, in comparison. 0: only who names its path meets it."""
    host: str = ""
    """Loopback address of its own. Default: any of the server's hosts."""


def _good(name: str, does: str, **options) -> Fault:
    return Fault(name=name, does=does, **options)


def _failed(name: str, does: str, failure: str, **options) -> Fault:
    return Fault(name=name, does=does, state=FAILED, failure=failure, **options)


def _refused(name: str, does: str, failure: str, **options) -> Fault:
    return Fault(name=name, does=does, state=REFUSED, failure=failure, **options)


def _robots(name: str, does: str, failure: str, *, host: str) -> Fault:
    is_retried = None if failure == classes.ROBOTS_UNREACHABLE else False
    does = f"a host whose robots.txt {does}"
    return _refused(name, does, failure, is_retried=is_retried, host=host, weight=1)


FAULTS = {
    fault.name: fault
    for fault in (
        # Pictures that a careful client gets, and a careless one loses.
        _good("small", "a JPEG of half the size, which needs no resize", weight=3),
        _good("cmyk", "a JPEG in CMYK, as for printing", weight=1),
        _good("webp", "a WebP", weight=1),
        _good("avif", "an AVIF", weight=1),
        _good("gif", "an animated GIF of three frames", weight=1),
        _good("rotated", "a JPEG that EXIF turns by 90 degrees", weight=1),
        _good("alpha", "a PNG that is half transparent", weight=1),
        _good("deep", "a PNG of 16 bits a channel", weight=1),
        _good("palette", "a PNG with a palette", weight=1),
        _good("mislabeled", "a JPEG whose Content-Type is text/plain", weight=1),
        _good("gzipped", "a JPEG with Content-Encoding: gzip", weight=1),
        _good("chunked", "a JPEG without a Content-Length", weight=1),
        _good("non-ascii", "a JPEG; the listed URL has letters beyond ASCII", weight=1),
        _good("redirect", "one to three redirects, then a JPEG", weight=3),
        _good("heals-500", "500 for one or two requests, then a JPEG", is_retried=True),
        _good("heals-503", "503 for one or two requests, then a JPEG", is_retried=True),
        _good("throttled", "429 with Retry-After: 1 for a second, then a JPEG", is_retried=True),
        _good("robots-404", "a host without robots.txt", host="127.0.1.1", weight=1),
        _good("noai-other", "X-Robots-Tag: noai for another crawler", weight=1),
        _good("tdm-0", "tdm-reservation: 0, which allows", weight=1),
        Fault(
            name="duplicate",
            does="the URL of an earlier good row in another spelling",
            state=DUPLICATE,
            weight=4,
        ),
        # Answers that say no.
        _failed("status-403", "403", classes.http_failure(403), weight=3),
        _failed("status-404", "404", classes.http_failure(404), weight=6),
        _failed("status-410", "410", classes.http_failure(410)),
        _failed("status-500", "500, always", classes.http_failure(500), is_retried=True, weight=1),
        _failed("status-503", "503, always", classes.http_failure(503), is_retried=True, weight=1),
        # Hosts and connections that fail.
        _failed(
            "no-host", "a host name that does not resolve", classes.DNS, is_retried=None, weight=1
        ),
        _failed("refused", "a closed port", classes.CONNECT, is_retried=None, host="127.0.2.1"),
        _failed("no-tls", "https to a port that does not speak it", classes.TLS, is_retried=None),
        _failed(
            "reset",
            "a reset amid the body",
            classes.TRUNCATED,
            or_failure=classes.DISCONNECTED,
            is_retried=True,
        ),
        _failed("short", "less than Content-Length says", classes.TRUNCATED, is_retried=True),
        _failed("never", "no answer, ever", classes.TIMEOUT_FIRST_BYTE, is_retried=True, weight=1),
        _failed(
            "drip", "a body of a byte a second", classes.TIMEOUT_TRANSFER, is_retried=True, weight=1
        ),
        # Bodies that would fill a memory.
        _failed("endless", "a body without an end", classes.TOO_LARGE, weight=1),
        _failed("announced", "a Content-Length of a terabyte", classes.TOO_LARGE, weight=1),
        _failed("bomb", "1 MB of gzip that unpacks to 1 GiB", classes.TOO_LARGE, weight=1),
        _failed("pixels", "a PNG of 50,000 x 50,000", classes.TOO_MANY_PIXELS, weight=1),
        # Bodies that are no picture.
        _failed("html", "a page as image/jpeg", classes.NOT_AN_IMAGE, weight=3),
        _failed("svg", "an SVG", classes.NOT_AN_IMAGE),
        _failed("empty", "200 with an empty body", classes.NOT_AN_IMAGE, weight=1),
        _failed("half", "the first half of a JPEG", classes.CORRUPT),
        _failed("noise", "the magic number of JPEG, then noise", classes.CORRUPT),
        _failed(
            "long",
            "more than Content-Length says, which cuts the JPEG",
            classes.CORRUPT,
            or_failure=classes.BAD_ANSWER,
            weight=1,
        ),
        _failed("tiny", "a GIF of one pixel", classes.TOO_SMALL, weight=1),
        # Redirects that lead nowhere good.
        _failed("loop", "a redirect to itself", classes.BAD_REDIRECT),
        _failed("hops", "seven redirects before a JPEG", classes.BAD_REDIRECT, weight=1),
        _refused("to-file", "a redirect to file:///etc/passwd", classes.SCHEME),
        _refused("to-ftp", "a redirect to ftp:", classes.SCHEME, weight=1),
        _refused("to-private", "a redirect to 10.0.0.1", classes.PRIVATE_ADDRESS, weight=0),
        _refused("to-metadata", "a redirect to 169.254.169.254", classes.PRIVATE_ADDRESS, weight=0),
        # Owners who do not want it.
        _refused("forbidden", "a path that robots.txt forbids to all", classes.ROBOTS),
        _refused(
            "forbidden-to-us", "a path that robots.txt forbids to albef-crawler", classes.ROBOTS
        ),
        _robots("robots-all", "forbids all", classes.ROBOTS, host="127.0.1.2"),
        _robots("robots-500", "errs with 500", classes.ROBOTS_UNREACHABLE, host="127.0.1.3"),
        _robots(
            "robots-huge",
            "is 2 MB long and begins by forbidding all",
            classes.ROBOTS,
            host="127.0.1.4",
        ),
        _robots(
            "robots-moved", "has moved to one that forbids all", classes.ROBOTS, host="127.0.1.5"
        ),
        _robots("robots-never", "never comes", classes.ROBOTS_UNREACHABLE, host="127.0.1.6"),
        _refused("noai", "X-Robots-Tag: noai", classes.OPT_OUT, weight=1),
        _refused("noimageai", "X-Robots-Tag: noimageai", classes.OPT_OUT, weight=1),
        _refused("noindex", "X-Robots-Tag: noindex", classes.OPT_OUT, weight=1),
        _refused("noimageindex", "X-Robots-Tag: noimageindex", classes.OPT_OUT, weight=1),
        _refused("noai-mixed", "X-Robots-Tag: NoFollow, NoAI", classes.OPT_OUT, weight=1),
        _refused("noai-us", "X-Robots-Tag: albef-crawler: noai", classes.OPT_OUT, weight=1),
        _refused("tdm-1", "tdm-reservation: 1", classes.OPT_OUT, weight=1),
        # Rows that are no URL of ours.
        _refused("ftp", "an ftp: URL", classes.SCHEME, weight=1),
        _failed("no-url", "a row with an empty URL", classes.MALFORMED_ROW, weight=1),
        _failed("no-tab", "a row of one field", classes.MALFORMED_ROW, weight=1),
        _failed("no-utf8", "a row that is not UTF-8", classes.MALFORMED_ROW, weight=1),
    )
}


def host_addresses(num_hosts: int) -> list[str]:
    """Give the addresses of so many ordinary hosts, up to 250."""
    return [f"127.0.0.{number}" for number in range(1, num_hosts + 1)]


def deal(
    num_rows: int, *, faulty: float, seed: int = 0, without: Collection[str] = ()
) -> Iterator[str]:
    """Give each row's fault in turn: its name, or `picture`.

    About `faulty` of the rows have one, each kind as often as its weight says: kinds are dealt from
    shuffled decks, so that a list of some hundred faults has every kind. The first row has none.
    """
    kinds = [f.name for f in FAULTS.values() for _ in range(f.weight) if f.name not in without]
    dice, deck = random.Random(seed), []
    for row in range(num_rows):
        if dice.random() >= faulty or row == 0:
            yield PICTURE
            continue
        if not deck:
            deck = dice.sample(kinds, len(kinds))
        yield deck.pop()
