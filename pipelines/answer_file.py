"""A VQA model's answers in a file for the VQA server, which alone has those of the test splits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from albef_core.errors import InputError
from pipelines.evaluate_task import closed_answers, load_tuned, predict_examples
from pipelines.evaluation_config import EvaluateTaskConfig
from pipelines.examples import collect_examples
from pipelines.manifest import read_manifest
from pipelines.model_store import find_model


@dataclass(frozen=True, kw_only=True)
class AnswerFile:
    """What was written."""

    path: Path
    """JSON: a list of {"question_id", "answer"}, one a question."""
    num_questions: int
    num_undecodable: int
    """Questions whose picture does not decode: answered before a black one, as all must be."""


def write_answers(
    config: EvaluateTaskConfig, *, on_progress: Callable[[str, int, int], None]
) -> AnswerFile:
    """Answer every question of a corpus into `config.predictions`; Ray must be connected.

    Raises:
        InputError: model, corpus or list of answers is absent, damaged, or of another task, or a
            question has no id, or the id of another.
    """
    assert config.predictions is not None
    manifest, folder = read_manifest(config.corpus), find_model("--model", config.model)
    loaded = load_tuned(folder, "vqa", config)
    answers = closed_answers(config, loaded)
    table = collect_examples(manifest, "vqa", with_unanswered=True).table
    ids = table["id"].to_pylist()
    if "" in ids or len(set(ids)) < len(ids):
        raise InputError(
            f"{config.corpus}: {ids.count('')} of its {len(ids)} questions have no id, and"
            f" {len(ids) - len(set(ids))} have that of another. The server tells them apart by it:"
            " ingest questions with a `question_id` each."
        )
    rows = predict_examples(config, loaded, folder, table, answers, on_progress)
    said = [
        {"question_id": json.loads(name), "answer": str(row["answer"])}
        for name, row in zip(ids, rows, strict=True)
    ]
    config.predictions.parent.mkdir(parents=True, exist_ok=True)
    config.predictions.write_text(json.dumps(said) + "\n")
    return AnswerFile(
        path=config.predictions,
        num_questions=len(said),
        num_undecodable=sum(not row["is_shown"] for row in rows),
    )


def answers_table(written: AnswerFile) -> Table:
    """Lay out what was written for the terminal."""
    table = Table("answers", str(written.path), title="Not scored: for the VQA server")
    table.add_row("questions", f"{written.num_questions:,}")
    table.add_row("without a picture", f"{written.num_undecodable:,}")
    return table
