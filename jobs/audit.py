"""Find captions that do not fit: `python jobs/audit.py --model M --corpus DIR --out A`."""

from command_line import parse, run_job

from pipelines.config import AuditConfig


def main() -> None:
    config = parse(AuditConfig)
    # torch and mlflow come after the parse, so that --help is instant.
    from bars import progress_bars
    from rich.console import Console

    from pipelines.audit import PAGE_NAME, SCORES_NAME, audit
    from pipelines.audit_report import audit_table

    with progress_bars() as show:
        result = audit(config, on_progress=show)
    console = Console()
    console.print(audit_table(result))
    console.print(f"In {config.out}: {SCORES_NAME}, and the worst in {PAGE_NAME}", soft_wrap=True)
    console.print(f"In MLflow run {result.run_id} of {result.tracking_uri}", soft_wrap=True)
    if result.cleaned:
        next_command = f"python jobs/pretrain.py PRESET --corpus {result.cleaned}"
        console.print(f"Next: {next_command}", soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
