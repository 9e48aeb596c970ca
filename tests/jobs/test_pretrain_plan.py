"""`pretrain.py --plan` as a user types it: numbers with their labels, and no Ray, run or folder."""

import os
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).parents[2] / "jobs" / "pretrain.py"


def test_a_plan_is_printed_and_nothing_is_started(tmp_path: Path) -> None:
    command = ["paper-4m", "--plan", "--images", "4000000", "--on", "A100", "--price", "2.5"]

    process = subprocess.run(
        [sys.executable, str(JOB), *command],
        # A Ray that is joined by mistake is not there.
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9", "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 0, process.stderr
    assert "nothing was trained" in process.stdout
    assert "234,360 of 512 pairs, workers: 8" in process.stdout
    assert "A100, reported: 8 x A100 40 GB, the published code" in process.stdout
    assert list(tmp_path.iterdir()) == []
