"""One GET of a stranger's URL: to public addresses alone, bounded in bytes, time and redirects."""

import asyncio
import resource
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDictProxy
from yarl import URL

from pipelines import crawl_failures as classes
from pipelines.crawl_config import CrawlConfig
from pipelines.manifest import tool_version
from pipelines.urls import (
    ForeignSchemeError,
    canonical_url,
    is_public,
    literal_address,
)

AGENT = "albef-crawler"
"""Our name, as robots.txt and X-Robots-Tag call us."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
GOOD = frozenset({200, 203})
LARGE_BYTES = 1_000_000
MAX_LARGE = 16
"""So many bodies of an actor grow beyond LARGE_BYTES at once; others wait. It bounds memory."""
KEEP_ALIVE_S = 5.0
DNS_CACHE_S = 300
DNS_TRIES = 2
INFLATABLE = {"gzip", "x-gzip", "deflate"}
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that reserve a picture; `none` is short for noindex and nofollow."""
VALUED = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", "max-age"}
)
"""Directives with a colon of their own, which is no crawler's name before it."""

Headers = CIMultiDictProxy[str]


class FetchError(Exception):
    """A URL gave no body: the class of failure, and all that is known."""

    def __init__(
        self,
        failure: str,
        detail: str,
        *,
        status: int | None = None,
        num_bytes: int | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.failure, self.detail = failure, detail
        self.status, self.num_bytes = status, num_bytes
        self.wait_s = wait_s
        """What Retry-After asks for."""
        self.is_elsewhere = False
        """Whether it happened behind a redirect."""


@dataclass(frozen=True, slots=True)
class Body:
    """What a URL gave."""

    status: int
    data: bytes
    """Unpacked, where it came compressed."""
    num_bytes: int
    """As it came."""


class PrivateAddressError(OSError):
    """A name leads to addresses none of which is public."""


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses alone: what is returned is what is connected to."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve a name.

        Raises:
            PrivateAddressError: it has addresses, and none is public.
        """
        found = await self._inner.resolve(host, port, family)
        public = [one for one in found if is_public(one["host"])]
        if found and not public:
            raise PrivateAddressError(f"{host} is {found[0]['host']}")
        return public

    async def close(self) -> None:
        """Close the resolver that is asked."""
        await self._inner.close()


class HttpClient:
    """GETs with everything that keeps both sides safe. Open it in the loop that uses it."""

    def __init__(self, config: CrawlConfig) -> None:
        self._config = config
        self._large = asyncio.Semaphore(MAX_LARGE)
        _raise_open_files()
        inner = aiohttp.AsyncResolver(timeout=config.connect_timeout_s / DNS_TRIES, tries=DNS_TRIES)
        resolver = inner if config.allow_private_hosts else PublicResolver(inner)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the scheduler has limits of its own
                resolver=resolver,
                ttl_dns_cache=DNS_CACHE_S,
                keepalive_timeout=KEEP_ALIVE_S,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": user_agent(config.contact),
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(
                connect=config.connect_timeout_s, sock_read=config.first_byte_timeout_s
            ),
            auto_decompress=False,
            read_bufsize=2**18,
        )

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._session.close()

    async def get(
        self,
        url: str,
        *,
        max_bytes: int,
        is_cut: bool = False,
        check_hop: Callable[[str], Awaitable[None]] | None = None,
        check_headers: Callable[[Headers], None] | None = None,
    ) -> Body:
        """Fetch a canonical URL, through redirects.

        `is_cut`: a longer body is cut off and no failure. `check_hop` is asked before each URL that
        a redirect names, `check_headers` before a body or a redirect is taken; both refuse by
        FetchError.

        Raises:
            FetchError: there is no body.
        """
        try:
            async with asyncio.timeout(self._config.transfer_timeout_s):
                return await self._follow(url, max_bytes, is_cut, check_hop, check_headers)
        except TimeoutError:
            limit = f"not done within {self._config.transfer_timeout_s:g} s"
            raise FetchError(classes.TIMEOUT_TRANSFER, limit) from None

    async def _follow(
        self,
        url: str,
        max_bytes: int,
        is_cut: bool,
        check_hop: Callable[[str], Awaitable[None]] | None,
        check_headers: Callable[[Headers], None] | None,
    ) -> Body:
        for hop in range(self._config.max_redirects + 1):
            try:
                self._check_literal(url)
                if hop and check_hop is not None:
                    await check_hop(url)
                answer = await self._one(url, max_bytes, is_cut, check_headers)
            except FetchError as error:
                error.is_elsewhere = hop > 0
                raise
            if isinstance(answer, Body):
                return answer
            url = answer
        raise FetchError(classes.BAD_REDIRECT, f"more than {self._config.max_redirects} redirects")

    def _check_literal(self, url: str) -> None:
        # aiohttp asks no resolver for addresses.
        host = URL(url, encoded=True).raw_host or ""
        address = literal_address(host)
        if address and not self._config.allow_private_hosts and not is_public(address):
            raise FetchError(classes.PRIVATE_ADDRESS, address)

    async def _one(
        self,
        url: str,
        max_bytes: int,
        is_cut: bool,
        check_headers: Callable[[Headers], None] | None,
    ) -> Body | str:
        """Do one request: a body, or where it redirects to."""
        response, body = None, _Unpacked(max_bytes, is_cut=is_cut)
        try:
            async with self._session.get(URL(url, encoded=True), allow_redirects=False) as response:
                status, headers = response.status, response.headers
                if check_headers is not None and (status in GOOD or status in REDIRECTS):
                    check_headers(headers)
                if status in REDIRECTS:
                    return _target(url, headers)
                _check_status(response)
                await self._read(response, body)
                return Body(status, body.data(), body.num_bytes)
        except FetchError as error:
            error.status = response and response.status
            error.num_bytes = body.num_bytes or None
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure, detail = _classify(error, is_in_body=response is not None)
            raise FetchError(
                failure,
                detail,
                status=response and response.status,
                num_bytes=body.num_bytes or None,
            ) from None

    async def _read(self, response: aiohttp.ClientResponse, body: "_Unpacked") -> None:
        body.expect(response.content_length, response.headers.get("Content-Encoding", ""))
        async with AsyncExitStack() as held:
            is_large = False
            async for chunk in response.content.iter_any():
                body.add(chunk)
                if body.is_full:
                    return
                if body.num_bytes > LARGE_BYTES and not is_large:
                    is_large = True
                    await held.enter_async_context(self._large)


def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status not in GOOD:
        failure, wait_s = classes.http_failure(response.status), retry_after_s(response.headers)
        raise FetchError(failure, response.reason or "", wait_s=wait_s)


class _Unpacked:
    """A body as it comes in, and what it unpacks to; neither grows beyond `max_bytes`."""

    def __init__(self, max_bytes: int, *, is_cut: bool) -> None:
        self.num_bytes = 0
        self.is_full = False
        self._max_bytes, self._is_cut = max_bytes, is_cut
        self._chunks: list[bytes] = []
        self._unpacked = 0
        self._inflate: Any = None

    def expect(self, length: int | None, encoding: str) -> None:
        """Hear what the headers say."""
        if (length or 0) > self._max_bytes and not self._is_cut:
            raise FetchError(classes.TOO_LARGE, f"Content-Length is {length}")
        encoding = encoding.strip().lower()
        if encoding in INFLATABLE:
            self._inflate = zlib.decompressobj(wbits=47)  # finds out whether it is gzip or zlib
        elif encoding not in ("", "identity"):
            raise FetchError(classes.BAD_ANSWER, f"Content-Encoding is {encoding}")

    def add(self, chunk: bytes) -> None:
        """Take what came."""
        self.num_bytes += len(chunk)
        room = self._max_bytes - self._unpacked
        if self._inflate is not None:
            try:
                chunk = self._inflate.decompress(chunk, room + 1)
            except zlib.error as error:
                raise FetchError(classes.BAD_ANSWER, str(error)) from None
        self._unpacked += len(chunk)
        self._chunks.append(chunk)
        if self._unpacked > self._max_bytes or self.num_bytes > self._max_bytes:
            if not self._is_cut:
                raise FetchError(classes.TOO_LARGE, f"more than {self._max_bytes} bytes")
            self.is_full = True

    def data(self) -> bytes:
        """Give all that was unpacked."""
        if self._inflate is not None and not self._inflate.eof and not self.is_full:
            raise FetchError(classes.TRUNCATED, "compressed, and cut off")
        return b"".join(self._chunks)[: self._max_bytes]


def user_agent(contact: str) -> str:
    """Name us, and who answers for what we do."""
    version = tool_version().replace(" ", "-")
    return f"{AGENT}/{version} (+{contact})" if contact else f"{AGENT}/{version}"


def check_opt_out(headers: Headers) -> None:
    """Refuse what the answer's headers reserve, for all or for us.

    `X-Robots-Tag` (Google's robots meta specification, with the directives noai and noimageai that
    DeviantArt introduced) and `tdm-reservation` (W3C TDM Reservation Protocol).

    Raises:
        FetchError: the picture is reserved.
    """
    if headers.get("tdm-reservation", "").strip() == "1":
        raise FetchError(classes.OPT_OUT, "tdm-reservation: 1")
    for value in headers.getall("X-Robots-Tag", ()):
        agent = ""
        for part in value.lower().split(","):
            name, colon, rest = (piece.strip() for piece in part.partition(":"))
            if colon and name not in VALUED:
                agent, name = name, rest
            if agent in ("", "*", AGENT) and name in OPT_OUTS:
                raise FetchError(classes.OPT_OUT, f"X-Robots-Tag: {part.strip()}")


def retry_after_s(headers: Headers) -> float | None:
    """Read Retry-After, in seconds from now (RFC 9110, section 10.2.3); None: absent or damaged."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None


def _target(url: str, headers: Headers) -> str:
    location = headers.get("Location", "")
    if not location:
        raise FetchError(classes.BAD_REDIRECT, "without a Location")
    try:
        return canonical_url(urljoin(url, location)).text
    except ForeignSchemeError as error:
        raise FetchError(classes.SCHEME, f"redirect to {error}:") from None
    except ValueError as error:
        raise FetchError(classes.BAD_REDIRECT, f"to {location[:200]!r}: {error}") from None


def _classify(error: Exception, *, is_in_body: bool) -> tuple[str, str]:
    """Name the class of what aiohttp raised."""
    detail = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorDNSError | UnicodeError):
        cause = getattr(error, "os_error", error)
        if isinstance(cause, PrivateAddressError):
            return classes.PRIVATE_ADDRESS, str(cause.args[0])
        return classes.DNS, str(cause.args[-1])
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return classes.TLS, detail
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return classes.TIMEOUT_CONNECT, detail
    if isinstance(error, aiohttp.ClientConnectorError):
        return classes.CONNECT, str(error.os_error)
    if isinstance(error, TimeoutError):
        return classes.TIMEOUT_TRANSFER if is_in_body else classes.TIMEOUT_FIRST_BYTE, detail
    if isinstance(error, aiohttp.ClientPayloadError):
        return classes.TRUNCATED, detail
    if isinstance(error, aiohttp.ClientConnectionError | OSError):
        return classes.TRUNCATED if is_in_body else classes.DISCONNECTED, detail
    return classes.BAD_ANSWER, detail


def _raise_open_files() -> None:
    """Take as many open files as may be had: hundreds of hosts leave connections behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
