import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from pipelines.crawl_config import CrawlConfig
from pipelines.http_client import (
    Body,
    FetchError,
    Headers,
    HttpClient,
    PrivateAddressError,
    PublicResolver,
    check_opt_out,
    retry_after_s,
)


def headers(*pairs: tuple[str, str]) -> Headers:
    return CIMultiDictProxy(CIMultiDict(pairs))


@pytest.mark.parametrize(
    "value",
    [
        "noai",
        "NoImageAI",
        "nofollow, noindex",
        "none",
        "unavailable_after: 25 Jun 2030 15:00:00 PST, noimageindex",
        "albef-crawler: noindex",
        "*: noai",
        "otherbot: nofollow, albef-crawler: noai",
    ],
)
def test_directives_that_reserve_a_picture_are_obeyed(value: str) -> None:
    with pytest.raises(FetchError) as refusal:
        check_opt_out(headers(("X-Robots-Tag", "all"), ("x-robots-tag", value)))

    assert refusal.value.failure == "opt-out"


@pytest.mark.parametrize(
    "pair",
    [
        ("X-Robots-Tag", "nofollow, nosnippet, max-image-preview: none"),
        ("X-Robots-Tag", "googlebot: noindex, noai"),
        ("tdm-reservation", "0"),
        ("X-Other", "noai"),
    ],
)
def test_directives_for_others_are_not(pair: tuple[str, str]) -> None:
    check_opt_out(headers(pair))


def test_a_reservation_of_text_and_data_mining_is_obeyed() -> None:
    with pytest.raises(FetchError, match="tdm-reservation: 1"):
        check_opt_out(headers(("TDM-Reservation", " 1")))


def test_retry_after_is_seconds_or_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=90)

    assert retry_after_s(headers(("Retry-After", "120"))) == 120
    date = retry_after_s(headers(("Retry-After", format_datetime(later, usegmt=True))))
    assert date == pytest.approx(90, abs=5)
    assert retry_after_s(headers(("Retry-After", "soon"))) is None
    assert retry_after_s(headers()) is None


class Names:
    """Stands in for the system's resolver."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int, family: int) -> list[dict[str, Any]]:
        return [{"hostname": host, "host": one, "port": port} for one in self._addresses]


def test_a_name_leads_to_its_public_addresses_alone() -> None:
    resolver = PublicResolver(Names("10.0.0.1", "93.184.216.34", "::1"))  # type: ignore[arg-type]

    found = asyncio.run(resolver.resolve("example.com", 80))

    assert [one["host"] for one in found] == ["93.184.216.34"]


def test_a_name_of_private_addresses_alone_is_refused() -> None:
    resolver = PublicResolver(Names("10.0.0.1"))  # type: ignore[arg-type]

    with pytest.raises(PrivateAddressError, match=r"example\.com is 10\.0\.0\.1"):
        asyncio.run(resolver.resolve("example.com", 80))


def get(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]], **options: Any
) -> Body | FetchError:
    """GET from a server that answers so."""

    async def run() -> Body | FetchError:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/start"
        config = CrawlConfig(out=Path("x"), allow_private_hosts=True)
        try:
            async with HttpClient(config) as client:
                return await client.get(url, **({"max_bytes": 1000} | options))
        except FetchError as error:
            return error
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_headers_are_judged_before_the_body_is_read() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Robots-Tag": "noai"})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    found = get(answer, check_headers=check_opt_out)

    assert isinstance(found, FetchError)
    assert (found.failure, found.status) == ("opt-out", 200)


def test_a_body_is_cut_off_where_that_is_asked_for() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * 5000)

    cut, whole = get(answer, is_cut=True), get(answer)

    assert isinstance(cut, Body)
    assert cut.data == b"x" * 1000
    assert isinstance(whole, FetchError)
    assert (whole.failure, whole.detail) == ("too large", "Content-Length is 5000")


def test_every_hop_is_checked_and_what_happens_there_is_elsewhere() -> None:
    hops: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/start":
            return web.Response(status=302, headers={"Location": "../next?a"})
        return web.Response(status=404)

    async def check(url: str) -> None:
        hops.append(url)

    found = get(answer, check_hop=check)

    assert isinstance(found, FetchError)
    assert (found.failure, found.is_elsewhere) == ("http 404", True)
    assert [hop.partition("/next")[2] for hop in hops] == ["?a"]


def test_so_many_redirects_are_followed_and_no_more() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        number = int(request.query.get("n", "0"))
        if number == aim:
            return web.Response(body=b"there")
        return web.Response(status=307, headers={"Location": f"/x?n={number + 1}"})

    aim = 5
    found = get(answer)
    assert isinstance(found, Body)
    assert found.data == b"there"
    aim = 6
    found = get(answer)
    assert isinstance(found, FetchError)
    assert found.failure == "bad redirect"


@pytest.mark.parametrize(
    ("location", "failure"),
    [(None, "bad redirect"), ("http://[bad", "bad redirect"), ("ftp://a/b", "scheme")],
)
def test_redirects_that_lead_nowhere_are_named(location: str | None, failure: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=301, headers={"Location": location} if location else {})

    found = get(answer)

    assert isinstance(found, FetchError)
    assert found.failure == failure


@pytest.mark.parametrize("encoding", ["br", "gzip"])
def test_a_body_packed_in_a_way_that_cannot_be_unpacked_is_a_bad_answer(encoding: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"no such thing", headers={"Content-Encoding": encoding})

    found = get(answer)

    assert isinstance(found, FetchError)
    assert found.failure == "bad answer"
