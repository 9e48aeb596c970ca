"""robots.txt of every host that is asked: fetched once, kept for a day at most (RFC 9309)."""

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import Executor
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

from pipelines import crawl_failures as classes
from pipelines.crawl_failures import HTTP, RATE_LIMITED
from pipelines.http_client import AGENT, FetchError, HttpClient

MAX_BYTES = 500 * 1024
"""More of a robots.txt is not read (RFC 9309, section 2.5)."""
KEPT_S = 24 * 3600.0
"""(RFC 9309, section 2.4.)"""
MAX_HOSTS = 4096
"""Hosts whose rules are kept; that of the one asked longest ago goes."""
HOST_FAILURES = (*classes.UNREACHABLE, classes.PRIVATE_ADDRESS)
"""What is wrong with the host itself, and so with every URL of it."""


@dataclass(frozen=True, slots=True)
class _Rules:
    parsed: Protego | None
    """None: everything is allowed."""
    until: float


class Robots:
    """Asks robots.txt before a URL is fetched."""

    def __init__(self, client: HttpClient, executor: Executor) -> None:
        self._client, self._executor = client, executor
        self._rules: OrderedDict[str, asyncio.Task[_Rules]] = OrderedDict()

    async def check(self, url: str) -> None:
        """Refuse a canonical URL that its host's robots.txt forbids us.

        Without one (a 4xx) all is allowed. Where it cannot be had, nothing is; a host that cannot
        be reached at all says so.

        Raises:
            FetchError: it is forbidden, or not known.
        """
        origin = origin_of(url)
        task = self._rules.get(origin)
        if task is None or (task.done() and _is_stale(task)):
            task = asyncio.create_task(self._load(origin))
            self._rules[origin] = task
            if len(self._rules) > MAX_HOSTS:
                self._rules.popitem(last=False)
        self._rules.move_to_end(origin)
        # Shielded: others wait for the same file, whatever ends this one's wait.
        rules = await asyncio.shield(task)
        if rules.parsed is not None and not rules.parsed.can_fetch(url, AGENT):
            raise FetchError(classes.ROBOTS, f"{origin}/robots.txt")

    async def _load(self, origin: str) -> _Rules:
        until = time.monotonic() + KEPT_S
        try:
            body = await self._client.get(f"{origin}/robots.txt", max_bytes=MAX_BYTES, is_cut=True)
        except FetchError as error:
            if error.failure.startswith(HTTP) and error.status and 400 <= error.status < 500:
                if error.failure != RATE_LIMITED:
                    return _Rules(None, until)
            elif error.failure == classes.BAD_REDIRECT:
                return _Rules(None, until)  # as unavailable (RFC 9309, section 2.3.1.2)
            elif not error.is_elsewhere and error.failure in HOST_FAILURES:
                raise
            detail = f"{origin}/robots.txt: {error.failure}"
            raise FetchError(
                classes.ROBOTS_UNREACHABLE, detail, status=error.status, wait_s=error.wait_s
            ) from None
        if not body.data.strip():
            return _Rules(None, until)
        loop = asyncio.get_running_loop()
        text = body.data.decode("utf-8", "replace")
        return _Rules(await loop.run_in_executor(self._executor, Protego.parse, text), until)


def origin_of(url: str) -> str:
    """Give scheme, host and port of a canonical URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _is_stale(task: "asyncio.Task[_Rules]") -> bool:
    failed = task.cancelled() or task.exception() is not None
    return failed or task.result().until < time.monotonic()
