"""Fetch pictures by URL: `python jobs/crawl.py --source LIST --out CRAWL --contact URL`."""

from command_line import parse, run_job

from pipelines.crawl_config import CrawlConfig


def main() -> None:
    config = parse(CrawlConfig)
    # Ray comes after the parse, so that --help is instant.
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.crawl import crawl

    result = crawl(config)
    report = result.report
    table = Table("crawl", Column(str(config.out), overflow="fold"), title="Crawl")
    for name, number in report.lists.items():
        table.add_row(f"rows of {name}", f"{number:,}")
    for state, number in report.states.items():
        table.add_row(state, f"{number:,}")
    for failure, number in report.failures.items():
        table.add_row(f"  {failure}", f"{number:,}")
    table.add_row("ended in this run", f"{report.num_fetched:,}, {report.rows_per_s:,.0f} a second")
    table.add_row("report", str(report.folder / "report" / "report.html"))
    if result.run_id:
        table.add_row("MLflow run", f"{result.run_id} of {result.tracking_uri}")
    table.add_row("next", f"python jobs/ingest.py --source {config.out} --out CORPUS")
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
