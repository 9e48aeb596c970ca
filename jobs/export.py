"""Write an official checkpoint: `python jobs/export.py --model MODEL --out FILE.pth`."""

from command_line import parse, run_job

from pipelines.config import ExportConfig


def main() -> None:
    config = parse(ExportConfig)
    # torch and mlflow come after the parse, so that --help is instant.
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.export import export

    exported = export(config.model, config.out)
    table = Table("file", Column(str(config.out), overflow="fold"), title="Export")
    for line in exported.inside:
        table.add_row("inside", line)
    for line in exported.not_inside:
        table.add_row("not inside", line)
    table.add_row("next", exported.next_command)
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
