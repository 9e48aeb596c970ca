import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_job(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/ingest.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.cluster
def test_the_job_builds_a_corpus_says_what_comes_next_and_builds_it_again(joined_ray, tmp_path):
    out = tmp_path / "corpus"
    done = run_job("--source", "shapes", "--out", str(out), "--num-images", "30", "--seed", "7")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["num_images"] == 30
    assert "jobs/pretrain.py" in done.stdout
    assert manifest["content_id"][:40] in done.stdout
    assert "pictures: 30 of 30 done" in done.stderr
    again = tmp_path / "again"
    done = run_job("--config", str(out / "config.json"), "--out", str(again))
    assert done.returncode == 0, done.stderr
    same = json.loads((again / "manifest.json").read_text())
    assert same["content_id"] == manifest["content_id"]


def test_a_finished_corpus_is_refused_with_one_line_and_code_2(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    done = run_job("--source", "shapes", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a corpus never changes" in done.stderr


def test_an_unknown_source_is_refused_with_what_is_accepted(tmp_path):
    done = run_job("--source", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "Accepted are `shapes`" in done.stderr
