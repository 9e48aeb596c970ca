"""Pre-train ALBEF on a corpus: `[ray job submit --] python jobs/pretrain.py tiny --corpus DIR`."""

from command_line import parse_preset, run_job

from pipelines.presets import PRETRAIN


def main() -> None:
    config = parse_preset(PRETRAIN)
    # torch and ray come after the parse, so that --help is instant.
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.train import pretrain

    result = pretrain(config)
    table = Table("run", Column(config.name, overflow="fold"), title="Pre-training")
    table.add_row("steps", f"{result.num_steps:,}")
    table.add_row("folder", str(result.run_dir))
    table.add_row("model", str(result.model))
    table.add_row("registered", result.stored.uri)
    table.add_row("MLflow run", f"{result.handle.run_id} in {result.handle.uri}")
    table.add_row("curves", f"mlflow ui --backend-store-uri {result.handle.uri}")
    next_command = f"python jobs/evaluate.py retrieval --model {result.model} --corpus HELD_OUT"
    table.add_row("next", next_command)
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
