"""A web server of pictures and faults, to try a crawler on: `python -m pipelines.fault_server`.

    python -m pipelines.fault_server --num-rows 2000 --list LIST.tsv --truth TRUTH.parquet
    python jobs/crawl.py --source LIST.tsv --out CRAWL --allow-private-hosts

It listens on loopback addresses alone: 127.0.0.1, 127.0.0.2, ..., each of which is a host of its
own, and some for hosts that are faulty as a whole. Linux has them all; elsewhere they must be set
up first. `/counts` tells how often each URL was asked for, and how often its answer was sent whole;
`/shapes-SEED/NUMBER.png` is the generated set.
"""

import argparse
import asyncio
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from pipelines.fault_answers import SHAPES, answer, number_and_hop, robots_txt
from pipelines.fault_bodies import MIB, Size, jpeg
from pipelines.fault_list import FaultList, write_list, write_truth
from pipelines.faults import FAULTS, PICTURE, host_addresses

ENDLESS_BYTES = 100_000_000
"""After so much `endless` ends all the same, or a client that reads on would fill its memory."""
RESET_AFTER_S = 0.1
"""What a client has not read by then is lost to it."""
TERABYTE = 10**12


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is like."""

    port: int = 0
    """0: one that is free."""
    num_hosts: int = 64
    """Addresses from 127.0.0.1 on, up to 250."""
    size: Size = (500, 375)
    """Width and height of the pictures."""
    drip_s: float = 1.0
    """Seconds between two bytes of `drip`."""
    faulty_hosts: bool = True
    """Listen for the hosts that are faulty as a whole, too."""


class FaultServer:
    """Answers by path, `/FAULT/NUMBER.jpg` or `/shapes-SEED/NUMBER.png`, and counts."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.port = 0
        self.requests: Counter[str] = Counter()
        """By host and path, as sent."""
        self.served: Counter[str] = Counter()
        """Of these, answers with 200 that were sent whole."""
        self._first_at: dict[str, float] = {}

    async def start(self) -> web.AppRunner:
        """Listen; whoever asked for it must clean the runner up.

        Raises:
            OSError: an address or the port cannot be had.
        """
        app = web.Application()
        app.router.add_get("/counts", self._counts)
        app.router.add_get("/{path:.*}", self._answer)
        # A client that has gone ends the handler that would let it wait for ever.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await runner.setup()
        self.port = self.options.port
        own = {fault.host for fault in FAULTS.values() if fault.host and fault.name != "refused"}
        if not self.options.faulty_hosts:
            own.clear()
        for address in [*host_addresses(self.options.num_hosts), *sorted(own)]:
            listener = socket.create_server((address, self.port), backlog=1024)
            self.port = listener.getsockname()[1]
            await web.SockSite(runner, listener).start()
        return runner

    async def _counts(self, request: web.Request) -> web.Response:
        return web.json_response({"requests": self.requests, "served": self.served})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        url, now = request.host + request.raw_path, time.monotonic()
        self.requests[url] += 1
        kind, _, name = request.path.removeprefix("/").partition("/")
        if request.path.endswith("/robots.txt"):
            return await self._robots(request)
        try:
            number, _hop = number_and_hop(name)
        except ValueError:
            return web.Response(status=404)
        if kind != PICTURE and kind not in FAULTS and not re.fullmatch(rf"{SHAPES}-\d+", kind):
            return web.Response(status=404)
        try:
            broken = await self._misbehave(request, kind, number)
        except ConnectionResetError:  # the client has had enough
            return web.Response()
        if broken is not None:
            return broken
        age_s = now - self._first_at.setdefault(url, now)
        response = answer(kind, name, self.options.size, times=self.requests[url], age_s=age_s)
        await response.prepare(request)
        await response.write_eof()
        self.served[url] += response.status == 200
        return response

    async def _robots(self, request: web.Request) -> web.Response:
        host = request.host.partition(":")[0]
        kind = next((name for name, fault in FAULTS.items() if fault.host == host), "")
        if kind == "robots-never":
            await asyncio.Event().wait()
        return robots_txt(kind, is_moved=request.path != "/robots.txt")

    async def _misbehave(
        self, request: web.Request, kind: str, number: int
    ) -> web.StreamResponse | None:
        """Do what no well-made answer does; None: the fault is of another sort."""
        if kind == "never":
            await asyncio.Event().wait()
        if kind not in ("drip", "endless", "reset", "short", "long", "announced"):
            return None
        picture = jpeg(number, self.options.size)
        middle = len(picture) // 2
        match kind:
            case "drip":
                await self._drip(request, picture)
            case "endless":
                return await _endless(request, picture)
            case "reset":
                await _break_off(request, picture[:middle], says=len(picture), is_reset=True)
            case "short":
                await _break_off(request, picture[:middle], says=len(picture))
            case "long":
                await _break_off(request, picture, says=middle)
            case "announced":
                await _break_off(request, picture, says=TERABYTE)
        # The connection is gone, which aiohttp finds out when it wants to send this.
        return web.Response()

    async def _drip(self, request: web.Request, picture: bytes) -> None:
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
        response.content_length = len(picture)
        await response.prepare(request)
        for place in range(len(picture)):
            await response.write(picture[place : place + 1])
            await asyncio.sleep(self.options.drip_s)


async def _endless(request: web.Request, picture: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
    await response.prepare(request)
    await response.write(picture)
    for _ in range(ENDLESS_BYTES // MIB):
        await response.write(bytes(MIB))
    return response


async def _break_off(
    request: web.Request, body: bytes, *, says: int, is_reset: bool = False
) -> None:
    """Write an answer past aiohttp, which would not lie, and end the connection."""
    transport = request.transport
    if transport is None:
        return  # the client has gone
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {says}\r\n\r\n"
    transport.write(head.encode() + body)
    if not is_reset:
        transport.close()
        return
    await asyncio.sleep(RESET_AFTER_S)
    # Lingering for no time, the system ends the connection by RST instead of FIN.
    raw = transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


@contextmanager
def fault_server(options: ServerOptions) -> Iterator[FaultServer]:
    """Run a server in a thread until the block ends."""
    server, loop = FaultServer(options), asyncio.new_event_loop()
    runner = loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="A web server of pictures and faults on loopback.")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--num-hosts", type=int, default=64, help="loopback addresses, up to 250")
    parser.add_argument("--width", type=int, default=500, help="of the pictures, in pixels")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--num-rows", type=int, default=2000, help="of the list")
    parser.add_argument("--faulty", type=float, default=0.3, help="share of its rows with a fault")
    parser.add_argument("--without", nargs="*", default=[], metavar="FAULT", choices=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", type=Path, help="TSV of URLs and captions, to be written")
    parser.add_argument("--truth", type=Path, help="Parquet of what must become of each row")
    options = parser.parse_args()
    server = FaultServer(
        ServerOptions(
            port=options.port, num_hosts=options.num_hosts, size=(options.width, options.height)
        )
    )

    async def serve() -> None:
        await server.start()
        rows = FaultList(
            port=server.port,
            num_rows=options.num_rows,
            faulty=options.faulty,
            num_hosts=options.num_hosts,
            size=(options.width, options.height),
            without=tuple(options.without),
            seed=options.seed,
        )
        if options.list is not None:
            write_list(rows, options.list)
        if options.truth is not None:
            write_truth(rows, options.truth)
        sys.stdout.write(f"http://127.0.0.1:{server.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")


if __name__ == "__main__":
    main()
