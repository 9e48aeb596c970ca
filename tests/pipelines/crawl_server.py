"""A small server of pictures and faults on a loopback address, in a thread of its own."""

import asyncio
import gzip
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import cv2
import numpy as np
from aiohttp import web


@cache
def jpeg(number: int, width: int = 500, height: int = 375) -> bytes:
    """Make a JPEG of its own for every number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


BOMB = gzip.compress(b"\xff\xd8\xff" + bytes(10_000_000))
GZIP = {"Content-Encoding": "gzip"}
BODIES: dict[str, Callable[[], tuple[bytes, dict[str, str]]]] = {
    "html": lambda: (b"<!doctype html><p>Gone", {"Content-Type": "image/jpeg"}),
    "truncated": lambda: (jpeg(1)[:3000], {}),
    "gzipped": lambda: (gzip.compress(jpeg(1)), GZIP),
    "bomb": lambda: (BOMB, GZIP),
}


class CrawlServer:
    """Serves by path; counts requests by path."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.robots: str | int = 404
        self.port = 0

    def url(self, path: str, *, host: str = "127.0.0.1") -> str:
        """Name a path of this server; every 127.0.0.x is a host of its own."""
        return f"http://{host}:{self.port}/{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Do what the first part of the path says."""
        self.counts[request.path] += 1
        self.headers.append(dict(request.headers))
        kind, _, rest = request.path.lstrip("/").partition("/")
        if kind in BODIES:
            body, headers = BODIES[kind]()
            return web.Response(body=body, headers=headers)
        return await getattr(self, f"_{kind}".replace(".", "_"), self._absent)(request, rest)

    async def _absent(self, _request: web.Request, _rest: str) -> web.StreamResponse:
        return web.Response(status=404)

    async def _robots_txt(self, _request: web.Request, _rest: str) -> web.StreamResponse:
        if isinstance(self.robots, int):
            return web.Response(status=self.robots)
        return web.Response(text=self.robots)

    async def _good(self, _request: web.Request, rest: str) -> web.StreamResponse:
        return web.Response(body=jpeg(int(rest.partition(".")[0])))

    async def _status(self, _request: web.Request, rest: str) -> web.StreamResponse:
        return web.Response(status=int(rest))

    async def _heals(self, request: web.Request, _rest: str) -> web.StreamResponse:
        is_ill = self.counts[request.path] < 3
        return web.Response(status=503) if is_ill else web.Response(body=jpeg(1))

    async def _busy(self, request: web.Request, rest: str) -> web.StreamResponse:
        if self.counts[request.path] < 2:
            return web.Response(status=429, headers={"Retry-After": rest})
        return web.Response(body=jpeg(1))

    async def _header(self, _request: web.Request, rest: str) -> web.StreamResponse:
        name, _, value = rest.partition("/")
        return web.Response(body=jpeg(1), headers={name: value})

    async def _to(self, request: web.Request, _rest: str) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["url"]})

    async def _loop(self, request: web.Request, _rest: str) -> web.StreamResponse:
        return web.Response(status=301, headers={"Location": request.path})

    async def _endless(self, request: web.Request, _rest: str) -> web.StreamResponse:
        return await self._stream(request, bytes(100_000), 0.001)

    async def _drip(self, request: web.Request, _rest: str) -> web.StreamResponse:
        return await self._stream(request, b"\xff", 0.05)

    async def _reset(self, request: web.Request, _rest: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "90000"})
        await response.prepare(request)
        await response.write(jpeg(1)[:1000])
        assert request.transport
        request.transport.abort()
        return response

    async def _never(self, _request: web.Request, _rest: str) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async def _stream(
        self, request: web.Request, chunk: bytes, wait_s: float
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(chunk)
            await asyncio.sleep(wait_s)


@contextmanager
def crawl_server() -> Iterator[CrawlServer]:
    """Run a server until the block ends."""
    server = CrawlServer()
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/{path:.*}", server.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "0.0.0.0", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        return runner

    runner = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
