"""The gate: is a candidate proven better than the champion on the same rows, and within limits?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from albef_core.errors import InputError
from albef_core.paired import Difference, paired_bootstrap
from pipelines.leaks import LeakReport
from pipelines.registry_config import Check, Gate

Verdict = Literal["pass", "fail", "unproven"]
"""`unproven`: the evidence is too weak to tell. The gate opens only where everything passes."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One line of a judgment."""

    what: str
    verdict: Verdict
    found: str
    needed: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One check's rows of both models."""

    candidate: pa.Table
    """As `row_scores` has it."""
    champion: pa.Table | None
    """None: there is no champion yet."""


def judge_scores(gate: Gate, check: Check, scores: Scores) -> list[Reason]:
    """Compare both models on the same rows; without a champion only `min_value` counts.

    Raises:
        InputError: the corpus does not give the check's metric, or the rows are not the same.
    """
    name = f"{check.task} on {check.corpus.name}, {check.column}"
    rows = _counted(check, scores.candidate)
    value = _mean(rows)
    reasons = []
    if check.min_value is not None:
        reasons.append(_limit(name, value, at_least=check.min_value))
    if scores.champion is None:
        found = f"{value:.1%}; there is no champion yet"
        return [*reasons, Reason(what=name, verdict="pass", found=found, needed="nothing")]
    champion = _counted(check, scores.champion)
    if rows["key"] != champion["key"]:
        raise InputError(
            f"{check.corpus}: candidate and champion have other rows of it ({len(rows)} and"
            f" {len(champion)}). A picture may have become unreadable: copy the corpus again."
        )
    difference = _difference(gate, rows, champion)
    num_pictures = len(rows["image_id"].unique())
    found = (
        f"{value:.1%}, champion {_mean(champion):.1%}: {100 * difference.value:+.2f} points"
        f" ({100 * difference.low:+.2f} to {100 * difference.high:+.2f}, {num_pictures} pictures)"
    )
    needed = f"{gate.confidence:.0%} interval above {100 * check.least_gain:+.2f} points"
    if num_pictures < gate.min_pictures:
        needed += f", of {gate.min_pictures} pictures at least"
    verdict = _verdict(gate, check, difference, num_pictures)
    return [*reasons, Reason(what=name, verdict=verdict, found=found, needed=needed)]


def judge_limits(
    gate: Gate, *, size_mb: float, latency_ms: float | None, leaks: Sequence[LeakReport | str]
) -> list[Reason]:
    """Hold a candidate against the limits that the gate has.

    `leaks` has one report for each corpus of the checks, or says why there is none.
    """
    reasons = []
    if gate.max_size_mb is not None:
        reasons.append(_limit("size, MB", size_mb, at_most=gate.max_size_mb))
    if gate.max_latency_ms is not None and latency_ms is not None:
        reasons.append(_limit("latency, ms", latency_ms, at_most=gate.max_latency_ms))
    for leak in leaks if gate.max_leak_share is not None else ():
        needed = f"at most {gate.max_leak_share:.2%} of the pictures"
        if isinstance(leak, str):
            reasons.append(Reason(what="leaks", verdict="unproven", found=leak, needed=needed))
            continue
        is_ok = leak.share <= (gate.max_leak_share or 0.0)
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in leak.by_kind.items())
        ids = f": {', '.join(leak.some_ids[:3])}" if leak.some_ids else ""
        found = f"{leak.num_leaked:,} of {leak.num_images:,} learned from ({kinds}){ids}"
        verdict: Verdict = "pass" if is_ok else "fail"
        reasons.append(Reason(what="leaks", verdict=verdict, found=found, needed=needed))
    return reasons


def _verdict(gate: Gate, check: Check, difference: Difference, num_pictures: int) -> Verdict:
    if difference.high <= check.least_gain:
        return "fail"
    if num_pictures < gate.min_pictures or difference.low <= check.least_gain:
        return "unproven"
    return "pass"


def _counted(check: Check, rows: pa.Table) -> pa.Table:
    """Take the rows that have the check's metric, as column `score`, sorted by their names."""
    if check.column not in rows.column_names:
        names = ", ".join(rows.column_names[3:])
        raise InputError(
            f"{check.corpus}: gives no {check.column} for {check.task}. There are: {names}."
        )
    rows = rows.select(["key", "image_id", "part", check.column])
    rows = rows.rename_columns(["key", "image_id", "part", "score"])
    is_counted = ~np.isnan(rows["score"].to_numpy())
    return rows.filter(pa.array(is_counted)).sort_by("key")


def _mean(rows: pa.Table) -> float:
    means = rows.group_by("part").aggregate([("score", "mean")])
    return float(np.mean(means["score_mean"].to_numpy()))


def _difference(gate: Gate, candidate: pa.Table, champion: pa.Table) -> Difference:
    groups, parts = (
        np.unique(candidate[name].to_numpy(), return_inverse=True)[1]
        for name in ("image_id", "part")
    )
    return paired_bootstrap(
        candidate["score"].to_numpy(),
        champion["score"].to_numpy(),
        groups,
        parts=parts,
        num_resamples=gate.num_resamples,
        seed=gate.seed,
        coverage=gate.confidence,
    )


def _limit(
    what: str, value: float, *, at_least: float | None = None, at_most: float | None = None
) -> Reason:
    """Hold a number against the one limit that is given."""
    if at_least is not None:
        is_ok, needed, found = value >= at_least, f"at least {at_least:.1%}", f"{value:.1%}"
    else:
        assert at_most is not None
        is_ok, needed, found = value <= at_most, f"at most {at_most:g}", f"{value:.1f}"
    return Reason(what=what, verdict="pass" if is_ok else "fail", found=found, needed=needed)
