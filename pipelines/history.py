"""The history of a registered model: every act on it, in MLflow, appended and never changed.

Acts are the versions of a second registered model, NAME.history, because the registry gives each
version a number of its own, atomically, whoever shares the store. An act is told by three tags,
each written once, in this order:

- `intent`, together with the entry: who wants what. From here on the act is open.
- `decision`: what was found, and the aliases as they were. From here on, if it is in favor, the act
  will be completed.
- `outcome`: done, refused or undone. From here on the act is closed.

Of the open acts the one with the lowest number is under way, and any other is refused. It must be
alive for that: an act whose process has ended is left behind, and the next one settles it.
"""

import getpass
import os
import socket
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.config_file import from_json, to_json
from pipelines.gate import Reason
from pipelines.tracking import git_commit

LOST_AFTER_HOURS = 24.0
"""An act of another host, which cannot be asked whether its process lives, is given up after."""
SOURCE = "act:/registry"
"""Versions need a source; there is nothing behind this one."""
DESCRIPTION = "Acts on a registered model, one a version; made by jobs/promote.py. Do not delete."
_under_way: set[str] = set()
"""Acts of this process that have not returned or raised yet."""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """Who wants what."""

    act: Literal["promote", "rollback"]
    candidate: str
    """Version that is to be the champion."""
    candidate_sha256: str
    """Of its card."""
    why: str
    gate: str
    """File, and the SHA-256 of what it says; empty in a rollback."""
    who: str = field(default_factory=lambda: _user())
    host: str = field(default_factory=socket.gethostname)
    process: str = field(default_factory=lambda: _name_process(os.getpid()))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""
    git_commit: str = field(default_factory=git_commit)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was found, and what the aliases were then."""

    in_favor: bool
    reasons: tuple[Reason, ...]
    champion: str
    """Version; empty: there was none."""
    champion_sha256: str
    """Of its card."""
    previous: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an act ended."""

    result: Literal["done", "refused", "undone"]
    why: str
    settled_by: int = 0
    """Number of the act that settled it, where its own process had ended; 0: it ended by itself."""
    ended: float = field(default_factory=time.time)
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """One entry."""

    number: int
    intent: Intent
    decision: Decision | None = None
    outcome: Outcome | None = None


class History:
    """The acts on one registered model."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self._client = client
        self._name = f"{model}.history"

    def acts(self) -> list[Act]:
        """Read all acts, the first one first."""
        found, token = [], None
        while True:
            page = self._client.search_model_versions(
                f"name='{self._name}'", max_results=1000, page_token=token
            )
            found += [_read(int(version.version), version.tags) for version in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda act: act.number)

    def begin(self, intent: Intent) -> tuple[Act, list[Act]]:
        """Append an act.

        Returns:
            The act, closed as refused if another one is under way; and those that were left behind,
            which the caller is to settle.
        """
        try:
            self._client.create_registered_model(self._name, description=DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        _under_way.add(intent.token)
        entry = self._client.create_model_version(
            self._name, SOURCE, tags={"intent": to_json(intent)}
        )
        own = Act(number=int(entry.version), intent=intent)
        earlier = [act for act in self.acts() if act.number < own.number and not act.outcome]
        for other in earlier:
            if _is_alive(other.intent):
                why = (
                    f"{other.intent.act} {other.number} by {other.intent.who} on"
                    f" {other.intent.host} is under way"
                )
                return self.close(own, Outcome(result="refused", why=why)), []
        return own, earlier

    def end(self, act: Act) -> None:
        """Say that this process does no more for an act, however it left it."""
        _under_way.discard(act.intent.token)

    def decide(self, act: Act, decision: Decision) -> Act:
        """Write what was found."""
        self._write(act, "decision", decision)
        return replace(act, decision=decision)

    def close(self, act: Act, outcome: Outcome) -> Act:
        """Write how the act ended."""
        self._write(act, "outcome", outcome)
        self.end(act)
        return replace(act, outcome=outcome)

    def is_open(self, act: Act) -> bool:
        """Tell whether nobody has settled an act in the meantime."""
        tags = self._client.get_model_version(self._name, str(act.number)).tags
        return "outcome" not in tags

    def _write(self, act: Act, tag: str, value: object) -> None:
        self._client.set_model_version_tag(self._name, str(act.number), tag, to_json(value))


def _read(number: int, tags: dict[str, str]) -> Act:
    return Act(
        number=number,
        intent=from_json(tags["intent"], Intent),
        decision=from_json(tags["decision"], Decision) if "decision" in tags else None,
        outcome=from_json(tags["outcome"], Outcome) if "outcome" in tags else None,
    )


def _is_alive(intent: Intent) -> bool:
    if intent.host != socket.gethostname():
        return time.time() - intent.started < LOST_AFTER_HOURS * 3600
    if intent.process == _name_process(os.getpid()):
        return intent.token in _under_way
    return intent.process == _name_process(int(intent.process.split()[0]))


def _name_process(pid: int) -> str:
    """Name a process by its number and, where the system tells, its start: numbers come again."""
    try:
        if not Path("/proc/self/stat").is_file():
            os.kill(pid, 0)
            return str(pid)
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return f"{pid} has ended"
    return f"{pid} has ended" if state == "Z" else f"{pid} {fields[18]}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a list of users
        return f"user {os.getuid()}"
