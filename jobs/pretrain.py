"""Pre-train ALBEF on a corpus: `[ray job submit --] python jobs/pretrain.py tiny --corpus DIR`."""

import sys

from command_line import parse_preset, run_job

from pipelines.presets import PLAN, PRETRAIN

PLAN_HELP = "--plan: only say what the run would take, on each GPU or --on one; see --plan --help."


def main() -> None:
    if "--plan" in sys.argv:
        planned = parse_preset(PLAN, args=[word for word in sys.argv[1:] if word != "--plan"])
        from plan_table import print_plan

        return print_plan(planned)
    config = parse_preset(PRETRAIN, note=PLAN_HELP)
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
