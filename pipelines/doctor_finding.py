"""What one check of the doctor found: verdict, numbers, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the sentence that says what to do about it."""

    verdict: Literal["warn", "fail"]
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the doctor's table."""

    check: str = ""
    """Name of the check; the doctor fills it in, and the seconds."""
    verdict: Verdict
    measured: str
    """What was looked at and found, with numbers and units."""
    remedy: str = ""
    """What to do; empty when nothing is wrong."""
    seconds: float = 0.0
    """How long the check took."""

    @staticmethod
    def of(measured: str, problems: Iterable[Problem] = ()) -> "Finding":
        """Judge by the worst problem; the remedies of failures come first."""
        ordered = sorted(problems, key=lambda problem: problem.verdict != "fail")
        verdict: Verdict = ordered[0].verdict if ordered else "pass"
        remedy = " ".join(problem.remedy for problem in ordered)
        return Finding(verdict=verdict, measured=measured, remedy=remedy)
