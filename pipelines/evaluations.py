"""Which evaluation belongs to a task, and which table to its result."""

from rich.table import Table

from pipelines.config import EvaluateConfig, EvaluateTaskConfig
from pipelines.evaluate import OnProgress, RetrievalResult, evaluate_retrieval
from pipelines.evaluate_task import TaskResult, evaluate_task
from pipelines.report import summary_table
from pipelines.task_report import task_table


def evaluate(
    task: str, config: EvaluateConfig | EvaluateTaskConfig, *, on_progress: OnProgress
) -> tuple[RetrievalResult | TaskResult, Table]:
    """Evaluate a model as the config says; also lay out the result for a terminal."""
    if isinstance(config, EvaluateConfig):
        result = evaluate_retrieval(config, on_progress=on_progress)
        return result, summary_table(result)
    result = evaluate_task(task, config, on_progress=on_progress)
    return result, task_table(result)
