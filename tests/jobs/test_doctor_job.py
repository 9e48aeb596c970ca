import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SmallCorpus

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


@pytest.mark.slow
@pytest.mark.cluster
def test_a_failure_is_a_table_a_file_and_code_1_with_what_to_do(
    joined_ray: None, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    flags = ["--corpus", str(small_corpus.folder), "--storage", str(tmp_path / "runs")]
    done = run_job("tiny", *flags, "--vocab-size", "50", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1, done.stderr
    saved = json.loads((tmp_path / "runs" / "doctor.json").read_text())
    for finding in saved["findings"]:
        assert finding["check"] in done.stdout
    assert "Not checked against the test sets" in " ".join(done.stdout.split())
    assert "--vocab-size 50" in done.stdout
    assert "MLFLOW_TRACKING_URI" in done.stdout


def test_a_corpus_that_is_not_there_is_refused_with_one_line_and_code_2(tmp_path: Path) -> None:
    done = run_job("tiny", "--corpus", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not a corpus" in done.stderr


def test_any_flag_of_a_pretraining_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    done = run_job("tiny", "--corpus", str(tmp_path), "--json", "out.json")
    assert done.returncode == 2
    assert "--json is not a flag" in done.stderr
