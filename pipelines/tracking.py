"""The one MLflow run of a training: its parameters, metrics and artifacts."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

# Read by MLflow when it is imported: nothing is ever unpickled; no bars between ours, and no notes
# on database migrations or a missing pip.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from albef_core.errors import InputError
from pipelines.outbox import Outbox

if TYPE_CHECKING:  # a run without figures need not load it
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
"""Names the run that a folder belongs to: in a training's folder, and in a model's."""
MAX_VALUE_LENGTH = 500
MAX_PARAMS_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
POINTS_PER_SENDING = 200
SECONDS_PER_SENDING = 5.0
HEALTH_TIMEOUT_S = 10.0
HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}


@dataclass(frozen=True)
class RunHandle:
    """All that another process needs to write into a run."""

    uri: str
    """Absolute tracking URI."""
    run_id: str

    def save(self, folder: Path) -> None:
        """Note in `folder` that it belongs to this run; by rename, so whole or not at all."""
        partial = folder / f"{RUN_FILE}.tmp"
        partial.write_text(json.dumps({"tracking_uri": self.uri, "run_id": self.run_id}))
        partial.replace(folder / RUN_FILE)

    @staticmethod
    def of(folder: Path) -> "RunHandle | None":
        """Read which run `folder` belongs to; None when it names none or the run is gone."""
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        body = json.loads(path.read_text())
        handle = RunHandle(body["tracking_uri"], body["run_id"])
        database = sqlite_file(handle.uri)
        if database is not None and not database.is_file():
            return None  # opening it would create an empty one
        check_server(handle.uri)
        try:
            run = MlflowClient(handle.uri).get_run(handle.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("%s: names run %s, which is gone (%s)", path, handle.run_id, error)
            return None
        return handle if run.info.lifecycle_stage == "active" else None


def tracking_uri() -> str:
    """Give the store's absolute URI: `MLFLOW_TRACKING_URI`, else `mlflow.db` in this folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or "sqlite:///mlflow.db"
    # Workers run in other folders: a relative name would be another store in each.
    database = sqlite_file(uri)
    if database is not None:
        return f"sqlite:///{database}"
    return uri if ":" in uri else Path(uri).absolute().as_uri()


def sqlite_file(uri: str) -> Path | None:
    """Give the database file of an SQLite URI, absolute; None for any other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


def open_run(
    experiment: str,
    run_dir: Path | None,
    *,
    run_name: str,
    params: Any,
    tags: Mapping[str, str],
) -> RunHandle:
    """Open the one run of a training, in the driver and before any worker starts.

    The first connection creates the database. The run's id is stored in `run_dir` (None: nowhere),
    and when it is already there, the same run is opened again: a resumed training is one run.
    `params` is a config dataclass; tag `git.commit` is added.

    Raises:
        InputError: the tracking server does not answer, or the experiment was deleted.
    """
    handle = None if run_dir is None else RunHandle.of(run_dir)
    uri = handle.uri if handle else tracking_uri()
    check_server(uri)
    client = MlflowClient(uri)
    if handle is None:
        run = client.create_run(_experiment_id(client, uri, experiment), run_name=run_name)
        handle = RunHandle(uri, run.info.run_id)
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            handle.save(run_dir)
    else:
        client.update_run(handle.run_id, status="RUNNING")
    _log_params(client, handle.run_id, flatten(params))
    for key, value in {"git.commit": git_commit(), **tags}.items():
        client.set_tag(handle.run_id, key, str(value)[:MAX_VALUE_LENGTH])
    return handle


def run_of_model(
    model: Path, experiment: str, *, run_name: str, params: Any, tags: Mapping[str, str]
) -> tuple[RunHandle, bool]:
    """Find the run that trained a model, or open one for what is found out about it (True)."""
    run = RunHandle.of(model)
    if run is not None:
        return run, False
    return open_run(experiment, None, run_name=run_name, params=params, tags=tags), True


@contextmanager
def findings(run: RunHandle, *, is_new: bool) -> Iterator["Tracker"]:
    """Write what is found out about a model into a run, and end one that was opened for it."""
    tracker = Tracker(run, skip_logged=False)
    try:
        yield tracker
    except BaseException:
        tracker.finish("FAILED") if is_new else tracker.close()
        raise
    tracker.finish() if is_new else tracker.close()


def settle_run(
    handle: RunHandle,
    *,
    status: str,
    tags: Mapping[str, str],
    curves: Mapping[str, Mapping[int, float]],
) -> None:
    """Bring to an end what a process left open that was ended from outside.

    Points of `curves`, by step, that it had not sent are added.
    """
    client, now = MlflowClient(handle.uri), int(time.time() * 1000)
    missing = []
    for name, values in curves.items():
        known = {point.step for point in client.get_metric_history(handle.run_id, name)}
        missing += [Metric(name, v, now, step) for step, v in values.items() if step not in known]
    if missing:
        client.log_batch(handle.run_id, metrics=missing)
    for key, value in tags.items():
        client.set_tag(handle.run_id, key, value[:MAX_VALUE_LENGTH])
    client.set_terminated(handle.run_id, status)


def fetch_artifact(run: RunHandle, path: str, folder: Path) -> Path | None:
    """Copy an artifact, a file or a folder, of a run into `folder`; None: the run has none.

    What lies on this machine is not copied: where it lies is told.
    """
    client = MlflowClient(run.uri)
    parent = Path(path).parent.as_posix()
    listed = client.list_artifacts(run.run_id, None if parent == "." else parent)
    if path not in [entry.path for entry in listed]:
        return None
    root = urlparse(client.get_run(run.run_id).info.artifact_uri)
    if root.scheme in ("", "file"):
        return Path(url2pathname(str(root.path))) / path
    return Path(client.download_artifacts(run.run_id, path, str(folder)))


def metric_name(text: str) -> str:
    """Replace what MLflow allows in no metric's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)


class Tracker:
    """Writes into a run from any one process, and never holds it up.

    Metrics are collected and sent in batches by a thread. While the store is down they wait and are
    sent when it is back; training goes on.

    A training that was killed and goes on from a checkpoint has every step once in each curve: what
    the store had not taken when the checkpoint was made is in it (`unsent`) and is logged again,
    the steps after it are repeated, and with `skip_logged` those that the store has already are
    left out.
    """

    def __init__(self, handle: RunHandle, *, skip_logged: bool = True) -> None:
        self.handle = handle
        self._skip_logged = skip_logged
        self._logged_steps: dict[str, set[int]] = {}
        self._unsent: deque[Metric] = deque()
        self._lock = threading.Lock()
        self._num_new, self._sent_at = 0, time.monotonic()
        self._spool = tempfile.TemporaryDirectory(prefix="albef-tracking-")
        self._outbox = Outbox(f"MLflow at {handle.uri}", is_hopeless=_is_hopeless)

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(self.handle.uri)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to each named curve; NaN and infinities are points too."""
        now = int(time.time() * 1000)
        self._add([Metric(key, float(v), now, step) for key, v in values.items()])

    def unsent(self) -> list[dict[str, Any]]:
        """Give the points that the store has not acknowledged, for a checkpoint.

        Whatever was logged before is in the store or in this list, or in both. JSON has no NaN and
        no infinity: such a value is its name.
        """
        with self._lock:
            points = list(self._unsent)
        return [
            {
                "key": point.key,
                "value": point.value if math.isfinite(point.value) else str(point.value),
                "timestamp": point.timestamp,
                "step": point.step,
            }
            for point in points
        ]

    def log_again(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Add what `unsent` gave to a checkpoint, before the steps after it are logged."""
        self._add([Metric(p["key"], float(p["value"]), p["timestamp"], p["step"]) for p in points])

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._outbox.put(lambda: self._client.set_tag(self.handle.run_id, key, value))

    def log_figure(self, figure: "Figure", path: str) -> None:
        """Store a figure as the artifact `path` (`.png`, `.pdf` or `.svg`)."""
        file = self._new_file(path)
        figure.savefig(file, bbox_inches="tight", dpi=120)
        self._upload(file, path)

    def log_dict(self, body: Mapping[str, Any], path: str) -> None:
        """Store a dictionary as the JSON artifact `path`."""
        file = self._new_file(path)
        file.write_text(json.dumps(body, indent=1, default=str) + "\n")
        self._upload(file, path)

    def log_artifact(self, source: Path, path: str) -> None:
        """Store a copy of a file as the artifact `path`."""
        self._upload(Path(shutil.copyfile(source, self._new_file(path))), path)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Send what was collected and wait for it a little; False when some of it still waits."""
        self._hand_over()
        return self._outbox.wait(timeout_s)

    def finish(self, status: str = "FINISHED", timeout_s: float = 30.0) -> None:
        """Send the rest and close the run as `FINISHED`, `FAILED` or `KILLED`."""
        self._hand_over()
        self._outbox.put(lambda: self._client.set_terminated(self.handle.run_id, status))
        self.close(timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Send the rest and stop; the run stays as it is."""
        self._hand_over()
        if num_lost := self._outbox.close(timeout_s):
            logger.warning("%s did not take the last %d messages", self.handle.uri, num_lost)
        self._spool.cleanup()

    def _add(self, points: list[Metric]) -> None:
        with self._lock:
            self._unsent.extend(points)
        self._num_new += len(points)
        is_due = time.monotonic() - self._sent_at > SECONDS_PER_SENDING
        if is_due or self._num_new >= POINTS_PER_SENDING:
            self._hand_over()

    def _hand_over(self) -> None:
        self._num_new, self._sent_at = 0, time.monotonic()
        self._outbox.put(self._send)

    def _send(self) -> None:
        """Send all that waits; a point is let go of only when the store has it or refuses it."""
        while points := self._oldest():
            try:
                new = [p for p in points if p.step not in self._steps_in_store(p.key)]
                if new:
                    self._client.log_batch(self.handle.run_id, metrics=new)
            except Exception as error:
                if not _is_hopeless(error):
                    raise
                logger.warning("%s refuses %d points: %s", self.handle.uri, len(points), error)
            with self._lock:
                for _ in points:
                    self._unsent.popleft()

    def _oldest(self) -> list[Metric]:
        with self._lock:
            return list(islice(self._unsent, MAX_METRICS_PER_CALL))

    def _steps_in_store(self, key: str) -> set[int]:
        # As the store had it when this process first wrote the metric, not as it is by now. Not
        # only the last step: whoever wrote before may have left holes.
        if key not in self._logged_steps:
            history = (
                self._client.get_metric_history(self.handle.run_id, key)
                if self._skip_logged
                else []
            )
            self._logged_steps[key] = {point.step for point in history}
        return self._logged_steps[key]

    def _new_file(self, path: str) -> Path:
        # In a folder of its own: two uploads of one name may wait at the same time.
        return Path(tempfile.mkdtemp(dir=self._spool.name)) / Path(path).name

    def _upload(self, file: Path, path: str) -> None:
        folder = Path(path).parent.as_posix()

        def upload() -> None:
            self._client.log_artifact(
                self.handle.run_id, str(file), None if folder == "." else folder
            )
            shutil.rmtree(file.parent)

        self._outbox.put(upload)


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """Name every field of nested dataclasses or dictionaries by its dotted path, as text."""
    named: dict[str, str] = {}
    items = (
        ((field.name, getattr(config, field.name)) for field in fields(config))
        if is_dataclass(config)
        else config.items()
    )
    for name, value in items:
        if is_dataclass(value) or isinstance(value, Mapping):
            named |= flatten(value, f"{prefix}{name}.")
        else:
            # As the command line takes it.
            is_list = isinstance(value, tuple)
            named[prefix + name] = " ".join(map(str, value)) if is_list else str(value)
    return named


def git_commit() -> str:
    """Give the commit of this code, with `-dirty` after it when files differ; else `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        database = sqlite_file(uri)
        # Without this, artifacts would go to the folder in which the first run was started.
        artifacts = None if database is None else (database.parent / "mlartifacts").as_uri()
        return client.create_experiment(name, artifact_location=artifacts)
    if found.lifecycle_stage != "active":
        raise InputError(
            f"--experiment {name}: was deleted from {uri}."
            " Restore it with `mlflow experiments restore`, or give another name."
        )
    return found.experiment_id


def _log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    # A resumed training may differ in a flag, and MLflow refuses to change a parameter: the first
    # stays.
    known = client.get_run(run_id).data.params
    new = [Param(k, v[:MAX_VALUE_LENGTH]) for k, v in params.items() if k not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_CALL])


def check_server(uri: str) -> None:
    """Ask a server for its health once, because MLflow's client would retry for minutes."""
    if not uri.startswith("http"):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers, if only to ask who we are
    except OSError as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI={uri}: no server answers there ({error})."
            " Start it, or unset the variable to track in ./mlflow.db."
        ) from None


def _is_hopeless(error: Exception) -> bool:
    if isinstance(error, MlflowException):
        return error.error_code in HOPELESS
    return not isinstance(error, OSError)
