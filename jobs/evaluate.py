"""Evaluate a model on a task: `python jobs/evaluate.py retrieval --model PATH --corpus DIR`."""

from command_line import parse_task, run_job

from pipelines.config import EvaluateConfig

TASKS = {
    "retrieval": (
        "Zero-shot image-text retrieval: ITC alone, then ITM over its best k.",
        EvaluateConfig,
    )
}


def main() -> None:
    _task, config = parse_task(TASKS)
    # torch and mlflow come after the parse, so that --help is instant.
    from pipelines.evaluate import evaluate_retrieval

    evaluate_retrieval(config)


if __name__ == "__main__":
    run_job(main)
