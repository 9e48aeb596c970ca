"""Evaluate a model on a task: `python jobs/evaluate.py retrieval --model PATH --corpus DIR`."""

from command_line import parse_task, run_job

from pipelines.config import EvaluateConfig

RETRIEVAL = "Zero-shot image-text retrieval: ITC alone, then ITM over its best k."


def main() -> None:
    _task, config = parse_task({"retrieval": (RETRIEVAL, EvaluateConfig)})
    # torch and mlflow come after the parse, so that --help is instant.
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

    from pipelines.cluster import connect
    from pipelines.evaluate import evaluate_retrieval
    from pipelines.report import summary_table

    connect()
    console = Console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=None)
            progress.update(bars[stage], completed=done, total=total or None)

        result = evaluate_retrieval(config, on_progress=show)
    console.print(summary_table(result))
    where = f" and {config.json}" if config.json else ""
    console.print(f"In MLflow run {result.run_id} of {result.tracking_uri}{where}", soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
