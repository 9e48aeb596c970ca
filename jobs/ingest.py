"""Build a corpus: `python jobs/ingest.py --source SRC --out DIR`; SRC: path, crawl, or `shapes`."""

from command_line import parse, run_job

from pipelines.ingest_config import IngestConfig


def main() -> None:
    config = parse(IngestConfig)
    # Ray comes after the parse, so that --help is instant.
    from functools import partial

    from bars import progress_bars
    from rich.console import Console

    from pipelines.crawl_store import is_crawl
    from pipelines.ingest_report import ingest_table

    if is_crawl(config.source):
        from pipelines.crawl_ingest import ingest_crawl as build
    else:
        from pipelines.ingest import ingest as build
    with progress_bars() as show:
        report = build(config, on_progress=partial(show, "pictures"))
    Console().print(ingest_table(report))


if __name__ == "__main__":
    run_job(main)
