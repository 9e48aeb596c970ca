"""How large a batch may be: the search on a GPU, and the memory of a process on a CPU."""

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CLEAR_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many pairs fit into the memory of the device at once."""

    largest: int
    """Pairs, with the margin already off."""
    is_measured: bool
    """Found by real steps; else estimated from small ones."""
    at_least: bool
    """The search ended before anything was too large."""
    bytes_per_pair: float
    memory_bytes: float
    """Memory of the device, or what a worker may take of the machine's."""
    seconds_per_pair: float


def largest_that(
    fits: Callable[[int], bool], *, first: int, most: int, limit_s: float
) -> tuple[int, bool]:
    """Double a size until it does not fit, then halve the interval to a sixteenth.

    Args:
        fits: tries a size.
        first: size to begin with.
        most: size from which on no larger one is tried.
        limit_s: seconds after which nothing more is tried.

    Returns:
        The largest size that fits (0: none), and whether the search ended before one did not.
    """
    stop = time.monotonic() + limit_s
    good, bad, size = 0, math.inf, first
    while good < most and bad - good > max(1, good // 16) and time.monotonic() < stop:
        if fits(size):
            good = size
        else:
            bad = size
        size = 2 * size if bad == math.inf else (good + int(bad)) // 2
    return good, bad == math.inf


def can_reset_peak() -> bool:
    """Tell whether this system measures the peak of a part of a process's life: Linux does."""
    return os.access(CLEAR_PEAK, os.W_OK)


def reset_peak() -> None:
    """Let `peak_bytes` begin again, from what is in use.

    Freed memory that the process still holds would be filled first, and a step would seem to take
    none: glibc gives it back when asked.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    CLEAR_PEAK.write_text("5")


def peak_bytes() -> int:
    """Give the most memory of this process since `reset_peak`."""
    return _memory_of_process("VmHWM")


def resident_bytes() -> int:
    """Give the memory of this process now."""
    return _memory_of_process("VmRSS")


def available_bytes() -> int:
    """Give the memory that the machine has left, or the container around this process."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def _memory_of_process(name: str) -> int:
    """Read a line such as `VmHWM:  123 kB` of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
