"""Every act of jobs/promote.py by its config: what came of it, and how a terminal shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from pipelines.history import Act
from pipelines.promote import check, promote, read_history, rollback
from pipelines.promote_report import diff_table, history_table, reasons_table
from pipelines.registry_config import (
    CheckConfig,
    DiffConfig,
    HistoryConfig,
    PromoteConfig,
    RollbackConfig,
)

Config = CheckConfig | PromoteConfig | RollbackConfig | HistoryConfig | DiffConfig


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a terminal shows."""

    tables: list[Table]
    lines: list[str]
    is_refused: bool = False
    """By the gate, by the proof of an old version, or because another act is under way."""


def carry_out(config: Config, *, on_progress: Callable[[str, int, int], None]) -> Result:
    """Do what a config asks of the registry.

    Raises:
        InputError: something that it names is absent, damaged or does not fit.
    """
    if isinstance(config, HistoryConfig):
        return Result(tables=[history_table(config.model, read_history(config.model))], lines=[])
    if isinstance(config, DiffConfig):
        return Result(tables=[diff_table(config.one, config.other)], lines=[])
    if isinstance(config, RollbackConfig):
        return _told(rollback(config))
    if isinstance(config, PromoteConfig):
        return _told(promote(config, on_progress=on_progress))
    judged = check(config, on_progress=on_progress)
    would = "would open; nothing was decided" if judged.in_favor else "would stay shut"
    return Result(
        tables=[reasons_table(judged.reasons, title=f"Against {_name(judged.champion)}")],
        lines=[f"The gate {would}."],
        is_refused=not judged.in_favor,
    )


def _told(act: Act) -> Result:
    assert act.outcome, "an act that returns is closed"
    version, reasons, before = act.intent.candidate, act.decision, ""
    if act.decision:
        before = act.decision.champion
    tables = [reasons_table(reasons.reasons, title=f"Against {_name(before)}")] if reasons else []
    if act.outcome.result == "done":
        line = f"Version {version} is the champion now"
        line += f", and version {before} is `previous`" if before else ""
    else:
        line = f"{act.intent.act} {version} is {act.outcome.result}: {act.outcome.why}"
    lines = [f"{line} (act {act.number} of the history)."]
    return Result(tables=tables, lines=lines, is_refused=act.outcome.result != "done")


def _name(champion: str) -> str:
    return f"champion {champion}" if champion else "no champion"
