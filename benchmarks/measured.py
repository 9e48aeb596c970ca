"""What a command costs with all that it starts: seconds, CPU seconds, and memory at its peak."""

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.training_process import descendants, kill_all, wait_until_gone

CPU_EVERY_S, MEMORY_EVERY_S = 0.25, 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command took."""

    code: int
    """Exit code; -9 where it ran past its limit."""
    wall_s: float
    cpu_s: float
    """Of the command, its children and theirs."""
    peak_gb: float
    """Largest sum of their proportional sets: shared pages are counted once."""


@dataclass
class Family:
    """A process and everything that it has started, alive or not."""

    root: psutil.Process
    members: dict[psutil.Process, float] = field(default_factory=dict)
    """CPU seconds of each, as last seen."""

    def look(self) -> None:
        """Find new members, and see what the living ones have used."""
        for process in (self.root, *descendants(self.root)):
            self.members.setdefault(process, 0.0)
        for process in self.members:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            self.members[process] = times.user + times.system

    def memory(self) -> int:
        """Add up the proportional set sizes, in bytes."""
        total = 0
        for process in self.members:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    def end(self) -> None:
        """Let those that are left end, then kill them."""
        living = [process for process in self.members if process.is_running()]
        wait_until_gone([process for process in living if process != self.root])


def measure(
    command: list[str], log: Path, *, env: dict[str, str] | None = None, limit_s: float = 3600.0
) -> Cost:
    """Run a command to its end, or until it is killed after `limit_s`.

    What it says is added to `log`. CPU seconds of a process are those of its last look, at most
    a quarter of a second before its end; those that their parents waited for are exact.
    """
    started = time.monotonic()
    with log.open("a") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **(env or {})}
        )
    family = Family(psutil.Process(process.pid))
    peak, memory_at = 0, started
    pid, status, usage = 0, 0, None
    try:
        while not pid:
            family.look()
            if time.monotonic() >= memory_at:
                peak = max(peak, family.memory())
                memory_at = time.monotonic() + MEMORY_EVERY_S
            if time.monotonic() - started > limit_s:
                kill_all([*family.members])
            time.sleep(CPU_EVERY_S)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = time.monotonic() - started
    finally:
        family.look()
        family.end()
        if not pid:
            kill_all([family.root])
    assert usage is not None
    return Cost(
        code=process.returncode,
        wall_s=round(wall_s, 1),
        cpu_s=round(max(sum(family.members.values()), usage.ru_utime + usage.ru_stime), 1),
        peak_gb=round(peak / 1e9, 2),
    )
