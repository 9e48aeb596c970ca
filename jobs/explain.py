"""Where a model finds each word: `python jobs/explain.py --model M --image F --text T --out F`."""

from command_line import parse, run_job

from pipelines.config import ExplainConfig


def main() -> None:
    config = parse(ExplainConfig)
    # torch comes after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.explain import explain

    with progress_bars() as show:
        result = explain(config, on_progress=show)
    wide = Column("text", overflow="fold")
    table = Table("picture", wide, Column("match", justify="right"), title="Heat map of each word")
    for row in result.explained:
        table.add_row(row.name, row.text, f"{row.match:.1%}")
    if result.left_out:
        parts = (f"{number:,} with {what}" for what, number in result.left_out.items())
        table.caption = f"left out: {', '.join(parts)}"
    console = Console(markup=False)  # a caption may have brackets
    console.print(table)
    console.print(f"Drawn into {result.out}", soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
