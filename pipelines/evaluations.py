"""Every evaluation by the name of its task: what it found, and how a terminal shows it."""

from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from albef_core.errors import InputError
from pipelines.answer_file import answers_table, write_answers
from pipelines.evaluate import RetrievalResult, evaluate_retrieval
from pipelines.evaluate_grounding import GroundingResult, evaluate_grounding
from pipelines.evaluate_task import TaskResult, evaluate_task
from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig
from pipelines.explain_report import grounding_table, sweep_table
from pipelines.report import summary_table
from pipelines.retrieval_report import recall_against_k_table, slices_table
from pipelines.task_report import task_table


def evaluate(
    task: str,
    config: EvaluateConfig | EvaluateGroundingConfig | EvaluateTaskConfig,
    *,
    on_progress: Callable[[str, int, int], None],
) -> tuple[list[Table], list[str]]:
    """Evaluate a model on a task; Ray must be connected.

    Returns:
        Tables of what was found, and lines that say where it is and what comes next.

    Raises:
        InputError: model or corpus is absent, damaged or of another task.
    """
    if isinstance(config, EvaluateConfig):
        retrieved = evaluate_retrieval(config, on_progress=on_progress)
        curve = [recall_against_k_table(retrieved)] if retrieved.sweep else []
        tables = [*curve, slices_table(retrieved), summary_table(retrieved)]
        return tables, _places(retrieved, config.json)
    if isinstance(config, EvaluateGroundingConfig):
        grounded = evaluate_grounding(config, on_progress=on_progress)
        sweep = [sweep_table(grounded)] if grounded.sweep else []
        return [*sweep, grounding_table(grounded)], _places(grounded, config.json)
    if config.predictions is None:
        scored = evaluate_task(task, config, on_progress=on_progress)
        return [task_table(scored)], _places(scored, config.json)
    if task != "vqa":
        raise InputError(f"--predictions: {task} has no server to send them to. Leave it out.")
    written = write_answers(config, on_progress=on_progress)
    return [answers_table(written)], [f"Next: upload {written.path} to the VQA server"]


def _places(result: RetrievalResult | GroundingResult | TaskResult, json: Path | None) -> list[str]:
    file = f" and {json}" if json else ""
    next_command = f"mlflow ui --backend-store-uri {result.tracking_uri}"
    return [
        f"In MLflow run {result.run_id} of {result.tracking_uri}{file}",
        f"Next, figures and intervals beside the curves: {next_command}",
    ]
