"""See the whole pipeline work on generated pictures: `python jobs/quickstart.py`."""

from command_line import parse, run_job

from pipelines.config import QuickstartConfig


def main() -> None:
    config = parse(QuickstartConfig)
    # Ray and torch come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console
    from rich.table import Column, Table

    from pipelines.quickstart import quickstart

    summary = quickstart(config, bars=progress_bars)
    result = f"{summary.times_chance:.1f} times chance, {summary.headline.upper()}"
    wide = Column(result, overflow="fold")
    table = Table("quickstart", wide, title="Zero-shot retrieval of unseen pictures")
    for stage, metrics in summary.metrics.items():
        found = metrics["mean_recall"]
        interval = f"95 % interval {found.low:.1%} to {found.high:.1%}, chance {found.chance:.1%}"
        table.add_row(f"mean recall, {stage.upper()}", f"{found.value:.1%} ({interval})")
    urls = ", ".join(f"{number:,} {state}" for state, number in summary.crawled.items() if number)
    table.add_row("URLs crawled", urls)
    for stage, seconds in summary.seconds.items():
        table.add_row(stage, f"{seconds:.0f} s")
    table.add_row("model", summary.model_uri)
    table.add_row("champion", f"{summary.champion_uri} ({summary.promotion})")
    table.add_row("MLflow run", summary.run_id)
    table.add_row("summary", str(config.out / "summary.json"))
    table.add_row("look at it", f"mlflow ui --backend-store-uri {summary.tracking_uri}")
    train = f"python jobs/pretrain.py tiny --corpus {summary.folders['corpus']} --epochs 20"
    table.add_row("train longer", train)
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
