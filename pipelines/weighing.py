"""Two versions on the scales: verified, evaluated where they were not yet, and judged by a gate."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from albef_core.errors import InputError
from pipelines.cluster import connect
from pipelines.evaluate import evaluate_retrieval
from pipelines.evaluate_grounding import evaluate_grounding
from pipelines.evaluate_task import evaluate_task
from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig
from pipelines.gate import Reason, Scores, judge_limits, judge_scores
from pipelines.leaks import LeakReport, find_leaks
from pipelines.manifest import read_manifest
from pipelines.model_card import Card
from pipelines.model_store import FetchedModel, ModelVersion, verify
from pipelines.registry_config import Check, CheckConfig, Gate
from pipelines.row_scores import read_rows, subject_of
from pipelines.served_outputs import differences, latency_ms, serve, serve_afresh
from pipelines.tracking import RunHandle, tracking_uri

logger = logging.getLogger(__name__)
OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all (0: not known)."""


def weigh(
    gate: Gate,
    config: CheckConfig,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    *,
    on_progress: OnProgress,
) -> list[Reason]:
    """Judge a candidate by a gate, against the champion where there is one.

    Every file of both is compared with its card, the candidate's stored checkpoint too. An
    evaluation that was made before, of the same model on the same corpus with the same settings, is
    taken as it is; else Ray is started.

    Raises:
        InputError: a model or corpus is absent, damaged or of another task, or gives no such
            metric.
    """
    fetched = verify(uri_of(candidate), with_checkpoint=True)
    card = _card(fetched, uri_of(candidate))
    other = verify(uri_of(champion)) if champion else None
    reasons: list[Reason] = []
    for check in gate.checks:
        ask = _Asking(config=config, check=check, on_progress=on_progress)
        rows = ask.rows(champion, other) if champion and other else None
        scores = Scores(candidate=ask.rows(candidate, fetched), champion=rows)
        reasons += judge_scores(gate, check, scores)
    model_bytes = sum(path.stat().st_size for path in fetched.folder.iterdir())
    corpora = {check.corpus for check in gate.checks} if gate.max_leak_share is not None else set()
    return reasons + judge_limits(
        gate,
        size_mb=model_bytes / 1e6,
        latency_ms=latency_ms(fetched.folder) if gate.max_latency_ms is not None else None,
        leaks=[_leaks(card, corpus) for corpus in sorted(corpora)],
    )


def prove_answers(uri: str) -> list[Reason]:
    """Let a model answer what it was asked when it was registered.

    Its files are those of its card, and it gives the recorded answers, both with the code of today
    and, in a process of its own, with the code that travels with it.

    Raises:
        InputError: a file of it has changed, or it does not load.
    """
    fetched = verify(uri)
    recorded = _card(fetched, uri).recorded
    rows = pd.DataFrame(recorded.inputs)
    reasons = []
    for what, answers in (
        ("answers by albef_core", serve(fetched.folder, rows)),
        ("answers by mlflow.pyfunc", serve_afresh(fetched.mlflow_model, recorded.inputs)),
    ):
        wrong = differences(recorded.outputs, answers)
        reasons.append(
            Reason(
                what=what,
                verdict="fail" if wrong else "pass",
                found="; ".join(wrong) or f"all {len(answers)} as recorded",
                needed="as recorded at its registration",
            )
        )
    return reasons


@dataclass(frozen=True, kw_only=True)
class _Asking:
    """One check, and how what is missing is evaluated."""

    config: CheckConfig
    check: Check
    on_progress: OnProgress

    def rows(self, version: ModelVersion, fetched: FetchedModel) -> pa.Table:
        """Read the rows of a version, or make them."""
        manifest = read_manifest(self.check.corpus)
        evaluation = self._evaluation(uri_of(version))
        subject = subject_of(
            self.check.task, evaluation, model=fetched.folder, corpus_id=manifest.content_id
        )
        made_by = RunHandle(tracking_uri(), version.run_id) if version.run_id else None
        if made_by and (rows := read_rows(made_by, subject)) is not None:
            return rows
        logger.info("%s: evaluating on %s", uri_of(version), self.check.corpus)
        connect()
        if isinstance(evaluation, EvaluateConfig):
            done = evaluate_retrieval(evaluation, on_progress=self.on_progress)
        elif isinstance(evaluation, EvaluateTaskConfig):
            done = evaluate_task(self.check.task, evaluation, on_progress=self.on_progress)
        else:
            done = evaluate_grounding(evaluation, on_progress=self.on_progress)
        rows = read_rows(RunHandle(done.tracking_uri, done.run_id), subject)
        if rows is None:
            raise InputError(
                f"{done.tracking_uri}: did not take the rows of an evaluation into run"
                f" {done.run_id}. Check that the store can be written to, and start again."
            )
        return rows

    def _evaluation(
        self, uri: str
    ) -> EvaluateConfig | EvaluateTaskConfig | EvaluateGroundingConfig:
        how: dict[str, Any] = {"actors": self.config.actors, "device": self.config.device}
        what: dict[str, Any] = {"model": uri, "corpus": self.check.corpus}
        if self.check.task == "grounding":
            return EvaluateGroundingConfig(**what, **how)
        kind = EvaluateConfig if self.check.task == "retrieval" else EvaluateTaskConfig
        return kind(**what, **how, batch_size=self.config.batch_size, top_k=self.check.top_k)


def _leaks(card: Card, corpus: Path) -> LeakReport | str:
    """Count what a candidate has learned from of a corpus, or say why that cannot be told."""
    held_out, known = read_manifest(corpus), card.provenance.leaks
    if known is not None and known.corpus_id == held_out.content_id:
        return known
    learned = card.provenance.corpus
    try:
        manifest = read_manifest(Path(learned.folder))
    except InputError:
        return f"what it learned from is not at {learned.folder} any more"
    if manifest.content_id != learned.content_id:
        return f"{learned.folder} holds another corpus than it learned from"
    return find_leaks(manifest, held_out)


def _card(fetched: FetchedModel, uri: str) -> Card:
    if fetched.card is None:
        raise InputError(
            f"{uri}: has no card, so nothing of it can be proven. Register it again: models have"
            " had cards since jobs/promote.py."
        )
    return fetched.card


def uri_of(version: ModelVersion) -> str:
    """Name a version as MLflow does."""
    return f"models:/{version.name}/{version.version}"
