"""Build a corpus: `python jobs/ingest.py --source SRC --out DIR`, SRC being a path or `shapes`."""

from command_line import parse, run_job

from pipelines.config import IngestConfig


def main() -> None:
    config = parse(IngestConfig)
    # Ray comes after the parse, so that --help is instant.
    from functools import partial

    from bars import progress_bars
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.ingest import ingest

    with progress_bars() as show:
        report = ingest(config, on_progress=partial(show, "pictures"))
    table = Table("corpus", Column(str(report.folder), overflow="fold"), title="Ingest")
    table.add_row("images", f"{report.num_images:,}")
    table.add_row("captions", f"{report.num_captions:,}")
    for what, count in report.annotations.items():
        table.add_row(what, f"{count:,}")
    for kind, count in report.bad_counts.items():
        table.add_row(f"bad: {kind}", f"{count:,}")
    table.add_row("content id", report.content_id)
    table.add_row("report", str(report.folder / "report" / "report.html"))
    table.add_row("seconds", f"{report.seconds}")
    if not report.num_uncaptioned:
        table.add_row("next", f"python jobs/pretrain.py tiny --corpus {report.folder}")
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
