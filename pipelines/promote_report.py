"""Acts on the registry as a terminal shows them: reasons, history, two versions side by side."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from mlflow import MlflowClient
from rich.markup import escape
from rich.table import Column, Table

from albef_core.errors import InputError
from pipelines.gate import Reason
from pipelines.history import Act
from pipelines.model_card import Card
from pipelines.model_store import verify, version_of
from pipelines.tracking import flatten, tracking_uri

COLORS = {"pass": "green", "fail": "bold red", "unproven": "yellow"}
SHORT = 12
"""Digits of a hash that are shown."""


def reasons_table(reasons: Sequence[Reason], *, title: str) -> Table:
    """Lay out a judgment: what was found, and what was needed."""
    wide = [Column(name, overflow="fold") for name in ("check", "found", "needed")]
    table = Table(wide[0], "", *wide[1:], title=escape(title), show_lines=True)
    for reason in reasons:
        verdict = f"[{COLORS[reason.verdict]}]{reason.verdict}[/]"
        table.add_row(escape(reason.what), verdict, escape(reason.found), escape(reason.needed))
    return table


def history_table(model: str, acts: Sequence[Act]) -> Table:
    """Lay out all acts, the first one first."""
    what = Column("what was found", overflow="fold")
    table = Table("act", "when", "who", "what", what, title=f"History of {model}", show_lines=True)
    for act in acts:
        intent, decision, outcome = act.intent, act.decision, act.outcome
        before = f" after {decision.champion}" if decision and decision.champion else ""
        lines = (
            [f"{reason.what}: {reason.found}" for reason in decision.reasons] if decision else []
        )
        if outcome and outcome.why:
            by = f" (settled by act {outcome.settled_by})" if outcome.settled_by else ""
            lines.append(f"{outcome.result}: {outcome.why}{by}")
        if intent.why:
            lines.append(f"why: {intent.why}")
        if intent.gate:
            gate, _, digest = intent.gate.rpartition(" ")
            lines.append(f"gate: {gate} ({digest[:SHORT]})")
        hashes = f"{intent.candidate_sha256[:SHORT]} (version {intent.candidate})"
        if decision and decision.champion:
            hashes += f", {decision.champion_sha256[:SHORT]} (version {decision.champion})"
        lines += [f"cards: {hashes}", f"code: {intent.git_commit}"]
        result = outcome.result if outcome else "open"
        when = datetime.fromtimestamp(intent.started).astimezone()
        table.add_row(
            str(act.number),
            f"{when:%Y-%m-%d %H:%M:%S %z}",
            escape(f"{intent.who}\n{intent.host}"),
            f"{intent.act} {intent.candidate}{before}\n{result}",
            escape("\n".join(lines)),
        )
    return table


def diff_table(one: str, other: str) -> Table:
    """Lay out two versions side by side: corpora, metrics, and the fields and files that differ.

    Raises:
        InputError: one of them is absent, damaged, or no version with a card.
    """
    sides = [_told(uri) for uri in (one, other)]
    wide = [Column(escape(uri), overflow="fold") for uri in (one, other)]
    table = Table(Column("", overflow="fold"), *wide, title="Two versions")
    for part in sides[0]:
        values = [side[part] for side in sides]
        names = sorted({name for told in values for name in told})
        if part in ONLY_DIFFERENT:
            names = [name for name in names if values[0].get(name) != values[1].get(name)]
        if not names:
            continue
        table.add_section()
        table.add_row(f"[bold]{part}[/]")
        for name in names:
            table.add_row(escape(name), *(escape(told.get(name, "")) for told in values))
    return table


ONLY_DIFFERENT = ("config", "environment", "files")


def _told(uri: str) -> dict[str, dict[str, str]]:
    """Read all that is compared of a version, by part and name."""
    store = tracking_uri()
    fetched = verify(uri)
    version = version_of(MlflowClient(store, registry_uri=store), uri)
    if version is None or fetched.card is None:
        raise InputError(f"{uri}: no version with a card. Give one such as models:/albef-vqa/3.")
    metrics: dict[str, Any] = dict(fetched.card.provenance.metrics)
    if version.run_id:
        logged = MlflowClient(store).get_run(version.run_id).data.metrics
        metrics |= {name: value for name, value in logged.items() if name.startswith("eval/")}
    return {
        "corpus": _corpus(fetched.card),
        "metrics": {name: f"{value:.4g}" for name, value in metrics.items()},
        "config": flatten(fetched.card.provenance.config),
        "environment": {
            "git commit": fetched.card.provenance.git_commit,
            **fetched.card.provenance.environment,
        },
        "files": {
            name: f"{mark.bytes:,} bytes, {mark.sha256[:SHORT]}"
            for name, mark in fetched.card.files.items()
        },
    }


def _corpus(card: Card) -> dict[str, str]:
    corpus, leaks = card.provenance.corpus, card.provenance.leaks
    told = {
        "content id": corpus.content_id[:SHORT],
        "folder": corpus.folder,
        "pictures": f"{corpus.num_images:,}",
        "captions": f"{corpus.num_captions:,}",
        "sources": ", ".join(f"{name} {count:,}" for name, count in corpus.sources.items()),
    }
    if leaks is not None:
        told["of --val learned from"] = f"{leaks.num_leaked:,} of {leaks.num_images:,}"
    return told
