"""Check a pre-training before it starts: `python jobs/doctor.py PRESET --corpus DIR`."""

from command_line import parse_preset, run_job

from pipelines.presets import PRETRAIN

COLORS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def main() -> None:
    config = parse_preset(PRETRAIN)
    # torch and ray come after the parse, so that --help is instant.
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from pipelines.doctor import examine

    console = Console()
    with console.status("") as status:
        diagnosis = examine(config, on_check=lambda name: status.update(f"checking: {name}"))
    found = Column("what was measured, and what to do", overflow="fold")
    table = Table("check", "", found, Column("s", justify="right"), title="Doctor", show_lines=True)
    for finding in diagnosis.findings:
        color = COLORS[finding.verdict]
        text = escape(finding.measured)
        if finding.remedy:
            text += f"\n[{color}]{escape(finding.remedy)}[/]"
        verdict = f"[{color}]{finding.verdict}[/]"
        table.add_row(finding.check, verdict, text, f"{finding.seconds:.1f}")
    console.print(table)
    where = f"; {diagnosis.report}" if diagnosis.report else ""
    console.print(f"{diagnosis.seconds:.0f} s{where}", soft_wrap=True)
    if diagnosis.has_failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_job(main)
