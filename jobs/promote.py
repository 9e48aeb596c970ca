"""Champions of the registry: `python jobs/promote.py promote --gate gates/pretrain.yaml`."""

from command_line import parse_task, run_job

from pipelines.registry_config import (
    CheckConfig,
    DiffConfig,
    HistoryConfig,
    PromoteConfig,
    RollbackConfig,
)

ACTS = {
    "check": ("Weigh a version against the champion; decides nothing.", CheckConfig),
    "promote": ("Make a version the champion, if the gate lets it through.", PromoteConfig),
    "rollback": ("Make the previous champion the champion again.", RollbackConfig),
    "history": ("Print all acts, the refused ones too.", HistoryConfig),
    "diff": ("Show two versions side by side: diff ONE OTHER.", DiffConfig),
}


def main() -> None:
    _act, config = parse_task(ACTS, kind="act")
    # torch and mlflow come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console

    from pipelines.acts import carry_out

    with progress_bars() as show:
        result = carry_out(config, on_progress=show)
    console = Console()
    console.print(*result.tables, sep="\n")
    console.print(*result.lines, sep="\n", soft_wrap=True)
    if result.is_refused:
        raise SystemExit(1)


if __name__ == "__main__":
    run_job(main)
