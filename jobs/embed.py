"""Embed a corpus: `python jobs/embed.py --model M --corpus DIR --out E`; the same again goes on."""

from command_line import parse, run_job

from pipelines.config import EmbedConfig


def main() -> None:
    config = parse(EmbedConfig)
    # torch and Ray come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.embed import embed

    with progress_bars() as show:
        done = embed(config, on_progress=show)
    found = done.embeddings
    table = Table("embeddings", Column(str(config.out), overflow="fold"), title="Embed")
    table.add_row("pictures", f"{found.num_images:,}, of which {found.num_undecodable:,} null")
    table.add_row("captions", f"{found.num_captions:,}, of which {found.num_empty_captions:,} null")
    table.add_row("numbers a vector", f"{found.origin.feature_size:,}")
    table.add_row("files", f"{len(found.files):,}, of which {done.num_written:,} written now")
    table.add_row("seconds", f"{done.seconds}")
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
