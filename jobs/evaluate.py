"""Evaluate a model on a task: `python jobs/evaluate.py retrieval --model PATH --corpus DIR`."""

from command_line import parse_task, run_job

from pipelines.config import EvaluateConfig

RETRIEVAL = "Zero-shot image-text retrieval: ITC alone, then ITM over its best k."


def main() -> None:
    _task, config = parse_task({"retrieval": (RETRIEVAL, EvaluateConfig)})
    # torch and mlflow come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console

    from pipelines.cluster import connect
    from pipelines.evaluate import evaluate_retrieval
    from pipelines.report import summary_table

    connect()
    with progress_bars() as show:
        result = evaluate_retrieval(config, on_progress=show)
    console = Console()
    console.print(summary_table(result))
    where = f" and {config.json}" if config.json else ""
    console.print(f"In MLflow run {result.run_id} of {result.tracking_uri}{where}", soft_wrap=True)
    next_command = f"mlflow ui --backend-store-uri {result.tracking_uri}"
    console.print(f"Next, figure and intervals beside the curves: {next_command}", soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
