"""Evaluate a model on a task: `python jobs/evaluate.py retrieval --model PATH --corpus DIR`."""

from command_line import parse_task, run_job

from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig

TASKS = {
    "retrieval": ("Image-text retrieval: ITC alone, then ITM over its best k.", EvaluateConfig),
    "entailment": ("Visual entailment: accuracy over three classes.", EvaluateTaskConfig),
    "vqa": ("Visual question answering: from a closed list, or open.", EvaluateTaskConfig),
    "nlvr2": ("True or false of two pictures: accuracy.", EvaluateTaskConfig),
    "grounding": ("Grounding: pointing, heat in boxes, box choice.", EvaluateGroundingConfig),
}


def main() -> None:
    task, config = parse_task(TASKS)
    # torch and mlflow come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console

    from pipelines.cluster import connect
    from pipelines.evaluations import evaluate

    connect()
    with progress_bars() as show:
        tables, lines = evaluate(task, config, on_progress=show)
    console = Console()
    console.print(*tables, sep="\n")
    console.print(*lines, sep="\n", soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
