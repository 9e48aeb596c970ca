"""Whose turn it is: rows by host, with each host's limits, waits, retries and giving up.

Knows no network and no clock: who uses it says the time, in seconds.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from pipelines.crawl_failures import RATE_LIMITED, UNANSWERED, UNREACHABLE, find_failure
from pipelines.ledger import Wanted

MIN_STRIKES = 3
"""A host is tried so often at least before all of its rows are given up."""
MAX_UNANSWERED = 24
"""First tries in a row without an answer after which a host counts as dead."""
MAX_BACKOFF_S = 60.0


@dataclass(slots=True)
class Attempt:
    """A row under way, and how often it was tried in this run."""

    row: Wanted
    host: "Host"
    tries: int = 0
    failure: str = ""
    """Of its last try."""


@dataclass(slots=True, eq=False)
class Host:
    """One origin: scheme, name and port."""

    name: str
    waiting: deque[Attempt] = field(default_factory=deque)
    num_rows: int = 0
    """Rows in the queue, those under way and those that wait for another try included."""
    num_open: int = 0
    paused_until: float = 0.0
    next_at: float = 0.0
    """When the interval between requests has passed."""
    strikes: int = 0
    """Rounds in a row in which it could not be reached."""
    unanswered: int = 0
    """First tries in a row that it did not answer."""
    dead: str = ""
    """Class of failure with which it was given up."""
    is_ready: bool = False
    is_timed: bool = False


@dataclass(frozen=True, kw_only=True)
class HostLimits:
    """How a host is treated."""

    connections: int
    interval_s: float
    retries: int
    backoff_s: float
    max_wait_s: float


class HostQueue:
    """Rows waiting for their hosts.

    A host that cannot be reached is waited for as a whole, with one row as its probe, and given up
    after `retries`: its other rows end with it, and cost no deadline each.
    """

    def __init__(self, limits: HostLimits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._hosts: dict[str, Host] = {}
        self._ready: deque[Host] = deque()
        self._timers: list[tuple[float, int, Host, Attempt | None]] = []
        self._numbers = count()
        self._given_up: deque[Attempt] = deque()
        self.num_rows = 0
        """Rows in the queue, those under way included."""

    def add(self, row: Wanted, origin: str, now: float) -> None:
        """Put a row in its host's line."""
        host = self._hosts.get(origin)
        if host is None:
            host = self._hosts[origin] = Host(origin)
        self.num_rows += 1
        host.num_rows += 1
        self._put(Attempt(row, host), now)

    def next(self, now: float) -> Attempt | None:
        """Give the next row that may be fetched now; `end` or `release` has to follow."""
        self._wake(now)
        while self._ready:
            host = self._ready.popleft()
            host.is_ready = False
            if not self._may_start(host, now):
                continue
            attempt = host.waiting.popleft()
            attempt.tries += 1
            host.num_open += 1
            host.next_at = now + self._limits.interval_s
            self._offer(host, now)
            return attempt
        return None

    def release(self, attempt: Attempt, now: float) -> None:
        """Free the host for its next request; the row itself is still under way."""
        attempt.host.num_open -= 1
        self._offer(attempt.host, now)

    def failed(
        self,
        attempt: Attempt,
        failure: str,
        *,
        now: float,
        wait_s: float | None = None,
        is_elsewhere: bool = False,
    ) -> bool:
        """Note a failure, after `release`; True: the row is tried again, and False: it has ended.

        `wait_s` is what the host asks to be left alone for. `is_elsewhere`: the failure is that of
        another host, to which this one redirects.
        """
        host = attempt.host
        attempt.failure = failure
        if is_elsewhere:
            wait_s = None
        else:
            self._judge(host, attempt, failure, now)
            if failure == RATE_LIMITED and wait_s is None:
                wait_s = self._delay(attempt.tries)
        if wait_s is not None and wait_s > self._limits.max_wait_s:
            host.dead = host.dead or failure
        elif wait_s is not None:
            host.paused_until = max(host.paused_until, now + wait_s)
        is_again = find_failure(failure).is_transient and attempt.tries <= self._limits.retries
        is_again = is_again and not host.dead
        if host.dead:
            self._bury(host)
        if not is_again:
            self._leave(host, now)
        elif not is_elsewhere and (failure in UNREACHABLE or wait_s is not None):
            self._put(attempt, now)
        else:
            self._at(now + self._delay(attempt.tries), host, attempt)
        self._offer(host, now)
        return is_again

    def ended(self, attempt: Attempt, now: float) -> None:
        """Note that a row has ended well."""
        attempt.host.strikes = attempt.host.unanswered = 0
        self._leave(attempt.host, now)
        self._offer(attempt.host, now)

    def given_up(self) -> Iterator[tuple[Attempt, str]]:
        """Take the rows that ended with their host, each with its class of failure."""
        while self._given_up:
            attempt = self._given_up.popleft()
            self.num_rows -= 1
            attempt.host.num_rows -= 1
            yield attempt, attempt.failure or attempt.host.dead

    def wait_s(self, now: float) -> float | None:
        """Tell how long until something can start by itself; None: nothing waits for a time."""
        return max(0.0, self._timers[0][0] - now) if self._timers else None

    def _judge(self, host: Host, attempt: Attempt, failure: str, now: float) -> None:
        if failure in UNREACHABLE:
            if now >= host.paused_until:  # the first one of this round to say so
                host.strikes += 1
                host.paused_until = now + self._delay(host.strikes)
            if host.strikes > max(self._limits.retries, MIN_STRIKES - 1):
                host.dead = failure
        elif failure in UNANSWERED:
            # Further tries are of rows that are known to be bad, and say nothing of the others.
            host.unanswered += attempt.tries == 1
            if host.unanswered >= MAX_UNANSWERED:
                host.dead = failure
        else:
            host.strikes = host.unanswered = 0

    def _delay(self, tries: int) -> float:
        delay = min(MAX_BACKOFF_S, self._limits.backoff_s * 2 ** (tries - 1))
        return delay * self._rng.uniform(1.0, 1.5)

    def _put(self, attempt: Attempt, now: float) -> None:
        host = attempt.host
        if host.dead:
            self._given_up.append(attempt)
        else:
            host.waiting.append(attempt)
            self._offer(host, now)

    def _bury(self, host: Host) -> None:
        self._given_up.extend(host.waiting)
        host.waiting.clear()

    def _leave(self, host: Host, now: float) -> None:
        """Let a row go, and a host of which nothing needs to be known any more."""
        self.num_rows -= 1
        host.num_rows -= 1
        is_plain = not (host.strikes or host.unanswered or host.dead or host.is_timed)
        if not host.num_rows and is_plain and max(host.paused_until, host.next_at) <= now:
            self._hosts.pop(host.name, None)

    def _may_start(self, host: Host, now: float) -> bool:
        limit = 1 if host.strikes else self._limits.connections
        is_free = bool(host.waiting) and host.num_open < limit
        return is_free and max(host.paused_until, host.next_at) <= now

    def _offer(self, host: Host, now: float) -> None:
        if self._may_start(host, now):
            if not host.is_ready:
                host.is_ready = True
                self._ready.append(host)
        elif host.waiting and not host.is_timed:
            start = max(host.paused_until, host.next_at)
            if start > now:
                host.is_timed = True
                self._at(start, host, None)

    def _at(self, when: float, host: Host, attempt: Attempt | None) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), host, attempt))

    def _wake(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _when, _number, host, attempt = heapq.heappop(self._timers)
            if attempt is None:
                host.is_timed = False
                self._offer(host, now)
            else:
                self._put(attempt, now)
