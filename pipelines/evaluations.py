"""Every evaluation by the name of its task: what it found, and how a terminal shows it."""

from collections.abc import Callable

from rich.table import Table

from pipelines.config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig
from pipelines.evaluate import RetrievalResult, evaluate_retrieval
from pipelines.evaluate_grounding import GroundingResult, evaluate_grounding
from pipelines.evaluate_task import TaskResult, evaluate_task
from pipelines.explain_report import grounding_table, sweep_table
from pipelines.report import summary_table
from pipelines.retrieval_report import recall_against_k_table, slices_table
from pipelines.task_report import task_table


def evaluate(
    task: str,
    config: EvaluateConfig | EvaluateGroundingConfig | EvaluateTaskConfig,
    *,
    on_progress: Callable[[str, int, int], None],
) -> tuple[RetrievalResult | GroundingResult | TaskResult, list[Table]]:
    """Evaluate a model on a task; Ray must be connected.

    Raises:
        InputError: model or corpus is absent, damaged or of another task.
    """
    if isinstance(config, EvaluateConfig):
        retrieved = evaluate_retrieval(config, on_progress=on_progress)
        curve = [recall_against_k_table(retrieved)] if retrieved.sweep else []
        return retrieved, [*curve, slices_table(retrieved), summary_table(retrieved)]
    if isinstance(config, EvaluateGroundingConfig):
        grounded = evaluate_grounding(config, on_progress=on_progress)
        sweep = [sweep_table(grounded)] if grounded.sweep else []
        return grounded, [*sweep, grounding_table(grounded)]
    answered = evaluate_task(task, config, on_progress=on_progress)
    return answered, [task_table(answered)]
