"""Find alpha and the learning rate: `python jobs/sweep.py tiny --corpus DIR --val DIR`."""

import sys

from command_line import parse_preset, run_job

from pipelines.presets import PRETRAIN, SWEEP


def main() -> None:
    config = parse_preset(SWEEP)
    # torch and ray come after the parse, so that --help is instant.
    from rich.console import Console

    from pipelines.sweep import sweep
    from pipelines.sweep_report import PAGE, answer, confirmed_lines, sweep_table

    preset = next((word for word in sys.argv[1:2] if word in PRETRAIN), "base")
    result = sweep(config, preset=preset, start=PRETRAIN[preset]())
    console = Console()
    console.print(sweep_table(result))
    for line in confirmed_lines(result):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(answer(result), soft_wrap=True)
    console.print(f"Next: {result.command}", soft_wrap=True, highlight=False)
    console.print(f"In {result.folder}/{PAGE}, and MLflow run {result.run_id} of"
                  f" {result.tracking_uri}", soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    run_job(main)
