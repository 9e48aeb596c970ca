"""Fine-tune a pre-trained model: `python jobs/finetune.py vqa --init MODEL --corpus DIR`."""

from command_line import parse_preset, run_job

from pipelines.presets import FINETUNE


def main() -> None:
    config = parse_preset(FINETUNE, kind="task")
    # torch and ray come after the parse, so that --help is instant.
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.finetune import finetune

    result = finetune(config)
    table = Table("run", Column(config.name, overflow="fold"), title=f"Fine-tuning: {config.task}")
    table.add_row("steps", f"{result.num_steps:,}")
    table.add_row("folder", str(result.run_dir))
    table.add_row("model", str(result.model))
    table.add_row("registered", result.stored.uri)
    table.add_row("MLflow run", f"{result.handle.run_id} in {result.handle.uri}")
    table.add_row("curves", f"mlflow ui --backend-store-uri {result.handle.uri}")
    next_command = f"python jobs/evaluate.py {config.task} --model {result.model} --corpus HELD_OUT"
    if config.task == "text-assignment":
        next_command = f"python jobs/finetune.py nlvr2 --init {result.model} --corpus NLVR2"
    table.add_row("next", next_command)
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
