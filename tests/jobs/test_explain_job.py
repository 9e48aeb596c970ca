import sys
from pathlib import Path

import pytest
from command_line import run_job
from explain import main


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--image gone.jpg --text dog --out a.png", "explain: gone.jpg: No such file or directory"),
        ("--image broken.jpg --text dog --out a.png", "explain: --image broken.jpg: cannot be"),
        ("--image broken.jpg --text ?! --out a.png", "explain: --text '?!': cleaning leaves no"),
        ("--image broken.jpg --text  --out a.png", "explain: --image and --text go together"),
        ("--corpus gone --out a.png", "explain: gone: not a corpus"),
        ("--corpus gone", "explain: --out is missing."),
    ],
)
def test_a_mistake_ends_the_job_with_one_line_and_exit_code_2(
    flags: str,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(sys, "argv", ["jobs/explain.py", "--model", "m", *flags.split(" ")])

    with pytest.raises(SystemExit) as end:
        run_job(main)

    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith(line)
    assert printed.count("\n") == 1
