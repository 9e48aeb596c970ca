"""Write a corpus as WebDataset tars: `python jobs/pack.py --corpus DIR --out DIR`."""

from command_line import parse, run_job

from pipelines.ingest_config import PackConfig


def main() -> None:
    config = parse(PackConfig)
    # Ray comes after the parse, so that --help is instant.
    from functools import partial

    from bars import progress_bars
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.pack import pack

    with progress_bars() as show:
        result = pack(config, on_progress=partial(show, "tars"))
    table = Table("tars", Column(str(result.folder), overflow="fold"), title="Pack")
    table.add_row("files", f"{result.num_tars:,}")
    table.add_row("images", f"{result.num_images:,}")
    table.add_row("bytes", f"{result.num_bytes:,}")
    table.add_row("content id", result.content_id)
    table.add_row("seconds", f"{result.seconds}")
    table.add_row("next", f"python jobs/ingest.py --source '{result.folder}/*.tar' --out DIR")
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
