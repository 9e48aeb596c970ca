import os
import subprocess
import sys
from pathlib import Path

import doctor
import pytest

from pipelines.doctor import Diagnosis
from pipelines.doctor_finding import Finding, Verdict

ROOT = Path(__file__).parents[2]


def run_job(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/doctor.py", *args]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(("verdict", "code"), [("warn", 0), ("fail", 1)])
def test_findings_are_a_table_and_only_a_failure_is_code_1(
    verdict: Verdict,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = [
        Finding(check="corpus", verdict="pass", measured="203 pictures"),
        Finding(check="tokenizer", verdict=verdict, measured="50 words", remedy="Give [more]."),
    ]
    diagnosis = Diagnosis(findings=findings, seconds=3.0, report=tmp_path / "doctor.json")
    monkeypatch.setattr("pipelines.doctor.examine", lambda config, on_check: diagnosis)
    monkeypatch.setattr(sys, "argv", ["doctor.py", "tiny", "--corpus", str(tmp_path)])
    found = 0
    try:
        doctor.main()
    except SystemExit as end:
        found = end.code
    assert found == code
    said = capsys.readouterr().out
    for word in ("corpus", "203 pictures", "tokenizer", verdict, "Give [more].", "doctor.json"):
        assert word in said


def test_a_corpus_that_is_not_there_is_refused_with_one_line_and_code_2(tmp_path: Path) -> None:
    done = run_job("tiny", "--corpus", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not a corpus" in done.stderr


def test_any_flag_of_a_pretraining_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    done = run_job("tiny", "--corpus", str(tmp_path), "--json", "out.json")
    assert done.returncode == 2
    assert "--json is not a flag" in done.stderr
