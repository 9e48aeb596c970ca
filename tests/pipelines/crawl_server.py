"""A small server of pictures and faults on a loopback address, in a thread of its own."""

import asyncio
import gzip
import threading
from collections import Counter
from collections.abc import Iterator
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
        path = request.path
        self.counts[path] += 1
        self.headers.append(dict(request.headers))
        kind, _, rest = path.lstrip("/").partition("/")
        picture = web.Response(body=jpeg(1), content_type="image/jpeg")
        match kind:
            case "robots.txt":
                if isinstance(self.robots, int):
                    return web.Response(status=self.robots)
                return web.Response(text=self.robots)
            case "good":
                return web.Response(body=jpeg(int(rest.partition(".")[0])))
            case "status":
                return web.Response(status=int(rest))
            case "heals":
                if self.counts[path] < 3:
                    return web.Response(status=503)
                return picture
            case "busy":
                if self.counts[path] < 2:
                    return web.Response(status=429, headers={"Retry-After": rest})
                return picture
            case "header":
                name, _, value = rest.partition("/")
                picture.headers[name] = value
                return picture
            case "to":
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case "loop":
                return web.Response(status=301, headers={"Location": path})
            case "html":
                return web.Response(body=b"<!doctype html><p>Gone", content_type="image/jpeg")
            case "gzipped":
                return web.Response(
                    body=gzip.compress(jpeg(1)), headers={"Content-Encoding": "gzip"}
                )
            case "bomb":
                body = gzip.compress(b"\xff\xd8\xff" + bytes(30_000_000))
                return web.Response(body=body, headers={"Content-Encoding": "gzip"})
            case "truncated":
                return web.Response(body=jpeg(1)[:3000])
            case "endless":
                return await self._stream(request, bytes(100_000), 0.0)
            case "drip":
                return await self._stream(request, b"\xff", 0.05)
            case "reset":
                response = web.StreamResponse(headers={"Content-Length": "90000"})
                await response.prepare(request)
                await response.write(jpeg(1)[:1000])
                assert request.transport
                request.transport.abort()
                return response
            case "never":
                await asyncio.sleep(60)
        return web.Response(status=404)

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
