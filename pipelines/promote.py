"""The champion of a registered model: weighed, moved, taken back; aliases only, one act at a time.

An act goes through the steps below, and may end after any of them by a crash, a lost server, or a
kill. The next act on the model then finds it open and settles it, before it does anything itself.

1. The intent is appended to the history. Ended here: nothing has moved, so it is undone.
2. Models are verified, evaluated and judged, and the decision is written, with the aliases as they
   are. Ended here, not in favor: it is refused. In favor: it is completed with steps 3 and 4, which
   may have been done already, for doing them twice changes nothing.
3. `previous` is moved to the champion, so that there is a version to fall back to at any moment.
4. `champion` is moved to the candidate.
5. The outcome is written. Ended before: as after step 2.

What was in favor is not completed where somebody has moved `champion` by hand since, or has deleted
the candidate: then it is undone, and `previous` is put back where it can be.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from albef_core.errors import InputError
from pipelines.config_file import read_yaml
from pipelines.gate import Reason
from pipelines.history import Act, Decision, History, Intent, Outcome
from pipelines.model_card import CARD_TAG
from pipelines.registry_config import CheckConfig, Gate, PromoteConfig, RollbackConfig
from pipelines.tracking import check_server, tracking_uri
from pipelines.weighing import OnProgress, prove_answers, uri_of, weigh

logger = logging.getLogger(__name__)
CHAMPION, PREVIOUS = "champion", "previous"


def check(config: CheckConfig, *, on_progress: OnProgress = lambda *_: None) -> Decision:
    """Judge as `promote` does, and change nothing.

    Raises:
        InputError: gate file, models or corpora are absent, damaged or do not fit.
    """
    gate = read_yaml(config.gate, Gate)
    client = _client()
    candidate = find_version(client, gate.model, config.candidate)
    return _weighed(client, gate, config, candidate, on_progress)


def promote(config: PromoteConfig, *, on_progress: OnProgress = lambda *_: None) -> Act:
    """Make a version the champion, if the gate lets it through; the old one becomes `previous`.

    Ray is started only where a model has not been evaluated on a corpus of the gate yet. The act
    says by its outcome whether it was done or refused, and by its decision why.

    Raises:
        InputError: gate file, models or corpora are absent, damaged or do not fit.
    """
    gate = read_yaml(config.gate, Gate)
    client = _client()
    candidate = find_version(client, gate.model, config.candidate)
    digest = hashlib.sha256(config.gate.read_bytes()).hexdigest()
    intent = Intent(
        act="promote",
        candidate=str(candidate.version),
        candidate_sha256=candidate.tags.get(CARD_TAG, ""),
        why=config.why,
        gate=f"{config.gate.absolute()} {digest}",
    )
    return _carry_out(
        client,
        gate.model,
        intent,
        lambda: _weighed(client, gate, config, candidate, on_progress),
    )


def rollback(config: RollbackConfig) -> Act:
    """Make `previous` the champion again, and the champion `previous`.

    First the old version is proven: its files are those of its card, and it gives the answers that
    were recorded when it was registered, both with the code of today and, in a process of its own,
    with the code that travels with it.

    Raises:
        InputError: there is no previous version, or it is not what it was.
    """
    client = _client()
    previous = find_version(client, config.model, PREVIOUS)
    intent = Intent(
        act="rollback",
        candidate=str(previous.version),
        candidate_sha256=previous.tags.get(CARD_TAG, ""),
        why=config.why,
        gate="",
    )

    def prove() -> Decision:
        seen = _seen(client, config.model)
        return _decision(seen, prove_answers(uri_of(previous)))

    return _carry_out(client, config.model, intent, prove)


def read_history(model: str) -> list[Act]:
    """Read all acts on a registered model, the first one first.

    Raises:
        InputError: the store has no such model.
    """
    client = _client()
    find_version(client, model, "")
    return History(client, model).acts()


def find_version(client: MlflowClient, model: str, which: str) -> ModelVersion:
    """Find a version of a registered model by number or alias; empty: the newest.

    Raises:
        InputError: there is none.
    """
    try:
        aliases = _aliases(client, model)
        if which.isdigit():
            return client.get_model_version(model, which)
    except MlflowException as error:
        raise InputError(
            f"{model} {which}: not in the MLflow store {tracking_uri()} ({error.message})."
            " Check the name, or set MLFLOW_TRACKING_URI to the store that has it."
        ) from None
    if which in aliases:
        return client.get_model_version(model, aliases[which])
    newest = client.search_model_versions(
        f"name='{model}'", max_results=1, order_by=["version_number DESC"]
    )
    if which or not newest:
        names = ", ".join(aliases) or "none"
        raise InputError(f"{model}: has no version {which}. Aliases: {names}.")
    return newest[0]


def _carry_out(
    client: MlflowClient, model: str, intent: Intent, decide: Callable[[], Decision]
) -> Act:
    """Go through the steps of an act, the first of which is to settle what was left behind."""
    history = History(client, model)
    act, left_behind = history.begin(intent)
    try:
        for other in left_behind:
            _settle(client, model, history, other, by=act.number)
        if act.outcome:
            return act
        try:
            decision = decide()
        except BaseException as error:
            _try_to_close(history, act, error)
            raise
        act = history.decide(act, decision)
        if not decision.in_favor:
            bad = [reason.what for reason in decision.reasons if reason.verdict != "pass"]
            return history.close(act, Outcome(result="refused", why=", ".join(bad)))
        if not history.is_open(act):
            raise InputError(
                f"{model}: act {act.number} took so long that another one has given it up."
                " Start it again."
            )
        if (now := _seen(client, model).champion) != decision.champion:
            why = f"{CHAMPION} was moved to {now or 'no version'} by hand meanwhile"
            return history.close(act, Outcome(result="undone", why=why))
        _move(client, model, act)
        return history.close(act, Outcome(result="done", why=""))
    finally:
        history.end(act)


def _try_to_close(history: History, act: Act, error: BaseException) -> None:
    """Close an act that has moved nothing."""
    result = "refused" if isinstance(error, InputError) else "undone"
    try:
        history.close(act, Outcome(result=result, why=str(error) or type(error).__name__))
    except MlflowException as lost:  # the next act settles it
        logger.warning("act %d stays open (%s)", act.number, lost)


def _settle(client: MlflowClient, model: str, history: History, act: Act, *, by: int) -> None:
    """Complete or undo an act whose process has ended, as the docstring of this file says."""
    decision = act.decision
    if decision is None or not decision.in_favor:
        result = "refused" if decision else "undone"
        why = "its process ended before it had " + ("said so" if decision else "decided")
        history.close(act, Outcome(result=result, why=why, settled_by=by))
        return
    aliases = _aliases(client, model)
    now, candidate = aliases.get(CHAMPION, ""), act.intent.candidate
    numbers = [str(version.version) for version in client.search_model_versions(f"name='{model}'")]
    if candidate in numbers and now in (decision.champion, candidate):
        _move(client, model, act)
        why = "its process ended before it had said so"
        history.close(act, Outcome(result="done", why=why, settled_by=by))
        return
    if decision.previous in numbers:
        client.set_registered_model_alias(model, PREVIOUS, decision.previous)
    elif PREVIOUS in aliases:
        client.delete_registered_model_alias(model, PREVIOUS)
    why = (
        f"{CHAMPION} is {now or 'no version'} now"
        if candidate in numbers
        else f"version {candidate} is gone"
    )
    history.close(act, Outcome(result="undone", why=why, settled_by=by))


def _move(client: MlflowClient, model: str, act: Act) -> None:
    assert act.decision
    if act.decision.champion:
        client.set_registered_model_alias(model, PREVIOUS, act.decision.champion)
    client.set_registered_model_alias(model, CHAMPION, act.intent.candidate)


def _weighed(
    client: MlflowClient,
    gate: Gate,
    config: CheckConfig,
    candidate: ModelVersion,
    on_progress: OnProgress,
) -> Decision:
    seen = _seen(client, gate.model)
    if seen.champion == str(candidate.version):
        raise InputError(f"{uri_of(candidate)}: is the champion already.")
    champion = client.get_model_version(gate.model, seen.champion) if seen.champion else None
    reasons = weigh(gate, config, candidate, champion, on_progress=on_progress)
    return _decision(seen, reasons)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The aliases at one moment; empty: there is none."""

    champion: str
    champion_sha256: str
    previous: str


def _aliases(client: MlflowClient, model: str) -> dict[str, str]:
    # A database gives numbers, a server texts.
    found = client.get_registered_model(model).aliases
    return {alias: str(version) for alias, version in found.items()}


def _seen(client: MlflowClient, model: str) -> _Seen:
    aliases = _aliases(client, model)
    champion = aliases.get(CHAMPION, "")
    tags = client.get_model_version(model, champion).tags if champion else {}
    return _Seen(
        champion=champion,
        champion_sha256=tags.get(CARD_TAG, ""),
        previous=aliases.get(PREVIOUS, ""),
    )


def _decision(seen: _Seen, reasons: list[Reason]) -> Decision:
    return Decision(
        in_favor=all(reason.verdict == "pass" for reason in reasons),
        reasons=tuple(reasons),
        champion=seen.champion,
        champion_sha256=seen.champion_sha256,
        previous=seen.previous,
    )


def _client() -> MlflowClient:
    uri = tracking_uri()
    check_server(uri)
    return MlflowClient(uri, registry_uri=uri)
