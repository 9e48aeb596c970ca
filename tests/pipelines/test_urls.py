import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.urls import (
    BadUrlError,
    ForeignSchemeError,
    canonical_url,
    is_public,
    literal_address,
    partition_of,
)


@pytest.mark.parametrize(
    ("listed", "canonical", "host"),
    [
        ("HTTP://Example.COM:80/a", "http://example.com/a", "example.com"),
        ("https://a.b:443", "https://a.b/", "a.b"),
        ("http://a.b:8080/x?q#part", "http://a.b:8080/x?q", "a.b:8080"),
        (" http://a/b/./c/../d%7e%2f%c3 ", "http://a/b/d~%2F%C3", "a"),
        ("http://b\u00fccher.de/\u00fc?\u00e9", "http://xn--bcher-kva.de/%C3%BC?%C3%A9", None),
        ("http://a/x y|{}\\", "http://a/x%20y%7C%7B%7D%5C", "a"),
        ("http://[::1]:81/x", "http://[::1]:81/x", "[::1]:81"),
        ("http://a/..", "http://a/", "a"),
        ("http://a/b/..", "http://a/", "a"),
        ("http://a/b/c/..", "http://a/b/", "a"),
    ],
)
def test_spellings_of_one_url_become_one(listed: str, canonical: str, host: str | None) -> None:
    url = canonical_url(listed)

    assert url.text == canonical
    assert url.host == host or host is None


@pytest.mark.parametrize(
    "pair",
    [
        ("http://a/x?b=1&a=2", "http://a/x?a=2&b=1"),
        ("http://a/x%2Cy", "http://a/x,y"),
        ("http://a/X", "http://a/x"),
        ("http://a/x/", "http://a/x"),
        ("http://a/x", "https://a/x"),
    ],
)
def test_what_a_server_may_tell_apart_stays_apart(pair: tuple[str, str]) -> None:
    assert canonical_url(pair[0]).key != canonical_url(pair[1]).key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.jpg",
        "//a/b",
        "http://",
        "http:///x",
        "http://a:99999/",
        "http://[::1",
        "http://a b/",
        "http://127.1/",
        "http://0x7f.1/",
        "http://2130706433/",
    ],
)
def test_what_is_no_url_says_why(text: str) -> None:
    with pytest.raises(BadUrlError, match=r"\w"):
        canonical_url(text)


@pytest.mark.parametrize("text", ["ftp://a/b", "file:///etc/passwd", "javascript:alert(1)"])
def test_other_schemes_are_named(text: str) -> None:
    with pytest.raises(ForeignSchemeError, match=f"^{text.partition(':')[0]}$"):
        canonical_url(text)


@given(st.text(max_size=60), st.text(max_size=20))
def test_the_canonical_form_is_ascii_and_its_own(path: str, query: str) -> None:
    try:
        once = canonical_url(f"http://host.example/{path}?{query}")
    except BadUrlError:
        return

    assert once.text.isascii()
    assert " " not in once.text
    assert canonical_url(once.text) == once


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:a00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("::10.0.0.1", False),
    ],
)
def test_addresses_of_private_networks_are_known_however_they_are_wrapped(
    address: str, public: bool
) -> None:
    assert is_public(address) is public


def test_a_host_that_is_an_address_is_known() -> None:
    assert literal_address("[::1]") == "::1"
    assert literal_address("127.0.0.1") == "127.0.0.1"
    assert literal_address("example.com") is None


def test_hosts_spread_over_partitions() -> None:
    counts = [0] * 8
    for number in range(4000):
        counts[partition_of(f"host-{number}.example", 8)] += 1

    assert min(counts) > 400
