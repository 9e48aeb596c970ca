"""URLs from strangers: their canonical form, their host, and which addresses may be asked."""

import ipaddress
import re
from dataclasses import dataclass
from hashlib import blake2b
from urllib.parse import SplitResult, urlsplit

from yarl import URL

DEFAULT_PORTS = {"http": 80, "https": 443}
KEY_BYTES = 16
MAX_URL_CHARS = 8192

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ESCAPED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNSENDABLE = re.compile(r"[^!#-;=?-\[\]_a-z~]")
_NUMERIC = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)\.?$")
"""A last label that makes a host an address, in spellings that programs read differently."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


class BadUrlError(ValueError):
    """A text that is no URL; the message says why."""


class ForeignSchemeError(ValueError):
    """A URL of another scheme than http and https; the message names it."""


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A URL in canonical form."""

    text: str
    host: str
    """Name or address, with the port where it is not the scheme's own: what politeness counts."""

    @property
    def key(self) -> bytes:
        """Identity of what the URL names: two spellings of one URL have the same."""
        return url_key(self.text)


def url_key(text: str) -> bytes:
    """Hash a URL in canonical form by BLAKE2b-128."""
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES).digest()


def canonical_url(text: str) -> WebUrl:
    """Write a URL as every spelling of it that means the same is written (RFC 3986, 6.2.2, 6.2.3).

    Scheme and host in lower case, the host by IDNA, no default port, no fragment, no dot segments;
    escapes in upper case, and none of characters that need none; all else that no URL may hold
    escaped as UTF-8. Reserved characters, order and case of path and query stay as they are:
    changing these could change what the server gives.

    Raises:
        BadUrlError: it has no host, an impossible port, or is longer than any server takes.
        ForeignSchemeError: its scheme is neither http nor https.
    """
    text = text.strip()
    if len(text) > MAX_URL_CHARS:
        raise BadUrlError(f"{len(text)} characters")
    try:
        parts = urlsplit(text)
        port = parts.port
        host = _ascii_host(parts)
    except ValueError as error:
        raise BadUrlError(str(error)) from None
    scheme = parts.scheme.lower()
    if scheme not in DEFAULT_PORTS:
        if scheme and (parts.netloc or not host):
            raise ForeignSchemeError(scheme)
        raise BadUrlError("no scheme")
    if not host:
        raise BadUrlError("no host")
    if _NUMERIC.search(host) and literal_address(host) is None:
        raise BadUrlError(f"{host} is no name, and no IPv4 address of four numbers")
    if port not in (None, DEFAULT_PORTS[scheme]):
        host = f"{host}:{port}"
    login, at, _ = parts.netloc.rpartition("@")
    path = _without_dots(_escape(parts.path)) or "/"
    query = f"?{_escape(parts.query)}" if parts.query else ""
    return WebUrl(f"{scheme}://{_escape(login)}{at}{host}{path}{query}", host)


def _ascii_host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    if ":" in host:
        return f"[{host}]"
    if not host or (host.isascii() and not re.search(r"[^a-z0-9._-]", host)):
        return host
    return URL.build(scheme="http", host=host).raw_host or ""


def _escape(text: str) -> str:
    if "%" in text:
        text = _ESCAPED.sub(_normal_escape, text)
    if _UNSENDABLE.search(text) is None:
        return text
    return _UNSENDABLE.sub(_percent, text)


def _normal_escape(match: re.Match[str]) -> str:
    byte = int(match[1], 16)
    return chr(byte) if byte in _UNRESERVED else f"%{byte:02X}"


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "replace"))


def _without_dots(path: str) -> str:
    """Remove dot segments (RFC 3986, section 5.2.4)."""
    if "/." not in path:
        return path
    segments = path.split("/")
    kept: list[str] = []
    for segment in segments[1:]:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    ends_open = segments[-1] in (".", "..") and bool(kept)
    return "/" + "/".join(kept) + "/" * ends_open


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet (IANA's special registries).

    An IPv6 address that carries an IPv4 one (mapped, compatible, 6to4, Teredo, NAT64) is as public
    as that.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64 or ip in _COMPATIBLE:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if carried := [one for one in inner if one is not None]:
            return all(is_public(str(one)) for one in carried)
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def literal_address(host: str) -> str | None:
    """Give the address where a URL's host is one; None where it is a name."""
    try:
        return str(ipaddress.ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        return None


def partition_of(host: str, num_partitions: int) -> int:
    """Deal a host, and with it every one of its URLs, to a partition."""
    digest = blake2b(host.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_partitions
