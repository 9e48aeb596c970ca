"""Build a corpus: `python jobs/ingest.py --source SRC --out DIR`, SRC being a path or `shapes`."""

from command_line import parse, run_job

from pipelines.config import IngestConfig


def main() -> None:
    config = parse(IngestConfig)
    # Ray comes after the parse, so that --help is instant.
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Column, Table

    from pipelines.ingest import ingest

    console = Console()
    if console.is_terminal:
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("pictures", total=None)
            show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            report = ingest(config, on_progress=show)
    else:
        report = ingest(config)
    table = Table("corpus", Column(str(report.folder), overflow="fold"), title="Ingest")
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("captions", f"{report.num_captions:,}")
    for kind, count in report.bad_counts.items():
        table.add_row(f"left out: {kind}", f"{count:,}")
    table.add_row("content id", report.content_id)
    table.add_row("report", str(report.folder / "report" / "report.html"))
    table.add_row("seconds", f"{report.seconds}")
    table.add_row("next", f"python jobs/pretrain.py tiny --corpus {report.folder}")
    console.print(table)


if __name__ == "__main__":
    run_job(main)
