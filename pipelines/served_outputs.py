"""What a registered model says of a small fixed example, here and in a fresh process."""

import base64
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
from PIL import Image

from albef_core.errors import InputError
from albef_core.weights import task_of_model
from pipelines.served_model import ServedModel

TOLERANCE = 1e-3
"""Cosines and probabilities may move so far: GPUs and CPUs, and versions of torch, sum in other
orders and at other precisions."""


def example(*, has_left: bool) -> pd.DataFrame:
    """Make the fixed example: two texts on a picture, or on two of them."""
    red_and_blue = Image.new("RGB", (48, 32), "red")
    red_and_blue.paste("blue", (24, 0, 48, 32))
    texts = ["a red square", "two dogs on a green lawn"]
    rows = {"image": [_png(red_and_blue)] * 2, "text": texts}
    if has_left:
        rows = {"left": [_png(Image.new("RGB", (32, 32), "red"))] * 2, **rows}
    return pd.DataFrame(rows)


def serve(model_folder: Path, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Let a model folder answer as `ServedModel` does, with the code of this process."""
    return _records(_loaded(model_folder)(rows))


def latency_ms(model_folder: Path, *, num_rows: int = 16, num_times: int = 5) -> float:
    """Measure how long a model folder takes for one row of a batch; the median of some batches."""
    has_left = task_of_model(model_folder) in ("nlvr2", "text-assignment")
    rows = pd.concat([example(has_left=has_left)] * (num_rows // 2), ignore_index=True)
    predict, seconds = _loaded(model_folder), []
    predict(rows)  # the first time pays for what later ones reuse
    for _ in range(num_times):
        started = time.perf_counter()
        predict(rows)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds) / len(rows)


def _loaded(model_folder: Path) -> Callable[[pd.DataFrame], pd.DataFrame]:
    served = ServedModel()
    context: Any = SimpleNamespace(artifacts={"model": str(model_folder)})
    served.load_context(context)
    return partial(served.predict, context)


def serve_afresh(mlflow_model: Path, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Let an MLflow model answer in a process of its own, with the code that travels with it.

    Raises:
        InputError: it does not load or answer any more.
    """
    columns = list(rows[0])
    split = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
    with tempfile.TemporaryDirectory(prefix="albef-serve-") as scratch:
        asked, answered = Path(scratch) / "rows.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps({"dataframe_split": split}))
        command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local"]
        files = ["-m", str(mlflow_model), "-i", str(asked), "-t", "json", "-o", str(answered)]
        # In another folder, or the project's own code would be found first.
        done = subprocess.run(
            [*command, *files], cwd=scratch, capture_output=True, text=True, check=False
        )
        if done.returncode or not answered.is_file():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise InputError(f"{mlflow_model}: does not load in mlflow.pyfunc ({' '.join(said)}).")
        return json.loads(answered.read_text())["predictions"]


def as_text(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Write the pictures of rows in base64, for JSON."""
    return [
        {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
            for name, value in row.items()
        }
        for row in _records(rows)
    ]


def differences(recorded: Iterable[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Name the answers that are not what was recorded, numbers beyond `TOLERANCE`."""
    wrong = []
    for number, (before, now) in enumerate(zip(recorded, found, strict=True)):
        for name, value in before.items():
            same = (
                math.isclose(value, now[name], rel_tol=0, abs_tol=TOLERANCE)
                if isinstance(value, float)
                else value == now[name]
            )
            if not same:
                wrong.append(f"{name} of row {number} is {now[name]}, recorded was {value}")
    return wrong


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", rows.to_dict("records"))


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
