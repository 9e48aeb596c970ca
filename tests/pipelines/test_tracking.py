import contextlib
import json
import math
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from albef_core.errors import InputError
from pipelines import tracking
from pipelines.config import PretrainConfig
from pipelines.tracking import RunHandle, Tracker, flatten, open_run
from tests.processes import free_port, kill_session, start_mlflow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite store for this file: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield folder


@pytest.fixture
def client(store):
    return MlflowClient(tracking.tracking_uri())


@pytest.fixture
def run(store, tmp_path):
    return open_run("test", tmp_path / "run", run_name="r", params={}, tags={})


def steps(client, run, key):
    return [point.step for point in client.get_metric_history(run.run_id, key)]


def test_the_store_is_a_file_in_the_working_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_relative_store_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/here.db"


def test_a_server_is_taken_as_given(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    assert tracking.tracking_uri() == "http://head:5000"


def test_parameters_carry_dotted_names():
    named = flatten(PretrainConfig(corpus=Path("c"), steps=3))
    assert named["optim.lr"] == "0.0001"
    assert named["steps"] == "3"
    assert all("(" not in value for value in named.values()), "no nested dataclass is left"


def test_more_parameters_than_one_call_takes_and_long_values_are_logged(client, store):
    params = {f"p{number}": "x" * 10_000 for number in range(130)}
    run = open_run("test", None, run_name="r", params=params, tags={})
    logged = client.get_run(run.run_id).data.params
    assert len(logged) == 130
    assert set(map(len, logged.values())) == {500}


def test_the_run_has_tags_and_its_artifacts_beside_the_store(client, store):
    run = open_run("test", None, run_name="r", params={}, tags={"corpus.id": "abc"})
    found = client.get_run(run.run_id)
    assert found.data.tags["corpus.id"] == "abc"
    assert found.data.tags["git.commit"]
    assert found.info.artifact_uri.startswith((store / "mlartifacts").as_uri())


def test_a_resumed_training_is_the_same_run_and_keeps_its_parameters(client, store, tmp_path):
    first = open_run("test", tmp_path, run_name="r", params={"seed": 1}, tags={"seed": "1"})
    Tracker(first).finish()
    again = open_run("test", tmp_path, run_name="r", params={"seed": 2, "x": 3}, tags={})
    assert again == first
    found = client.get_run(first.run_id)
    assert found.info.status == "RUNNING"
    assert found.data.params == {"seed": "1", "x": "3"}


def test_a_folder_whose_run_is_gone_gets_a_new_one(store, tmp_path):
    RunHandle(tracking.tracking_uri(), "0" * 32).save(tmp_path)
    run = open_run("test", tmp_path, run_name="r", params={}, tags={})
    assert RunHandle.of(tmp_path) == run


def test_a_folder_whose_store_is_gone_names_no_run_and_makes_no_store(tmp_path):
    RunHandle(f"sqlite:///{tmp_path}/gone.db", "0" * 32).save(tmp_path)
    assert RunHandle.of(tmp_path) is None
    assert not (tmp_path / "gone.db").exists()


def test_metrics_figures_and_files_arrive_in_the_run(client, run, tmp_path):
    tracker = Tracker(run)
    for step in range(300):
        tracker.log({"train/loss/itc": 1 / (step + 1), "train/alpha": 0.4}, step)
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure(figure, "pictures/curve.png")
    tracker.log_dict({"a": 1}, "config.json")
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt", "notes/note.txt")
    tracker.finish()
    assert steps(client, run, "train/loss/itc") == list(range(300))
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/alpha"] == 0.4
    artifacts = Path(found.info.artifact_uri.removeprefix("file://"))
    assert json.loads((artifacts / "config.json").read_text()) == {"a": 1}
    assert (artifacts / "notes" / "note.txt").read_text() == "hello"
    assert (artifacts / "pictures" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_replayed_step_is_not_logged_twice(client, run):
    before = Tracker(run)
    for step in range(6):
        before.log({"loss": 1.0}, step)
    before.close()
    resumed = Tracker(run)
    for step in range(4, 9):
        resumed.log({"loss": 1.0, "new": 2.0}, step)
    resumed.close()
    assert steps(client, run, "loss") == list(range(9))
    assert steps(client, run, "new") == list(range(4, 9))


def test_a_hole_that_an_earlier_process_left_is_filled(client, run):
    before = Tracker(run)
    for step in (0, 1, 2, 7, 8):
        before.log({"loss": 1.0}, step)
    before.close()
    resumed = Tracker(run)
    for step in range(10):
        resumed.log({"loss": 1.0}, step)
    resumed.close()
    assert sorted(steps(client, run, "loss")) == list(range(10))


def test_what_was_not_sent_travels_in_a_checkpoint_and_is_logged_again(client, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    killed = Tracker(RunHandle("http://127.0.0.1:9", run.run_id))  # the store is down
    killed.log({"loss": 0.5, "lr": math.nan}, 0)
    killed.log({"loss": -math.inf}, 1)
    assert not killed.flush()
    checkpoint = json.dumps(killed.unsent(), allow_nan=False)
    killed.close(timeout_s=0)
    resumed = Tracker(run)
    resumed.log_again(json.loads(checkpoint))
    resumed.log({"loss": 0.25}, 2)
    assert [point["step"] for point in resumed.unsent()] == [0, 0, 1, 2]
    resumed.close()
    assert resumed.unsent() == []
    assert steps(client, run, "loss") == [0, 1, 2]
    assert steps(client, run, "lr") == [0]
    sent_at = [point["timestamp"] for point in json.loads(checkpoint)]
    history = client.get_metric_history(run.run_id, "loss")
    assert [point.timestamp for point in history[:2]] == [sent_at[0], sent_at[2]]


def test_what_arrived_after_the_checkpoint_is_not_logged_twice(client, run):
    killed = Tracker(run)
    for step in range(5):
        killed.log({"loss": 1.0}, step)
    unsent = killed.unsent()
    killed.close()
    assert len(unsent) == 5
    resumed = Tracker(run)
    resumed.log_again(unsent)
    resumed.log({"loss": 1.0}, 5)
    resumed.close()
    assert steps(client, run, "loss") == list(range(6))


def test_nan_and_infinity_arrive_beside_ordinary_values(client, run):
    tracker = Tracker(run)
    for step, value in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0]):
        tracker.log({"loss": value, "lr": 0.1}, step)
    tracker.finish()
    first, nan, high, low, last = (p.value for p in client.get_metric_history(run.run_id, "loss"))
    assert (first, last) == (1.0, 2.0)
    assert math.isnan(nan)
    largest = sys.float_info.max  # SQL has no infinity: MLflow takes the largest number
    assert (high, low) == (largest, -largest)
    assert steps(client, run, "lr") == list(range(5))


TRAINING = """
import json, os, sys, time
from pathlib import Path
from pipelines import tracking

tracking.POINTS_PER_SENDING, tracking.MAX_METRICS_PER_CALL = 20, 15
file, last = Path(sys.argv[1]), int(sys.argv[2])
handle = tracking.RunHandle.of(file.parent)
tracker = tracking.Tracker(handle)
step = 0
if file.exists():
    checkpoint = json.loads(file.read_text())
    step = checkpoint["step"]
    tracker.log_again(checkpoint["unsent"])
print("ready", flush=True)
while step < last:
    step += 1
    tracker.log({"loss": 1 / step, "lr": 0.1}, step)
    if step % 7 == 0:
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps({"step": step, "unsent": tracker.unsent()}))
        partial.replace(file)
    time.sleep(0.002)
tracker.close()
"""


@pytest.mark.slow  # starts processes that import MLflow
def test_a_run_killed_at_any_moment_and_resumed_has_each_step_once(client, run, tmp_path):
    run.save(tmp_path)
    file, rng, reached = tmp_path / "checkpoint.json", random.Random(3), []
    for kill in [True, True, True, True, False]:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(file), "3000"], stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            if kill:
                time.sleep(rng.uniform(0.2, 1.2))
                process.kill()
        reached.append(json.loads(file.read_text())["step"])
    assert process.returncode == 0
    assert reached == sorted(set(reached)), "every process went on from where the one before was"
    for key in ("loss", "lr"):
        assert sorted(steps(client, run, key)) == list(range(1, 3001))


def test_a_metric_that_the_store_refuses_does_not_hold_up_the_others(client, run):
    tracker = Tracker(run)
    tracker.log({"what?": 1.0}, 0)
    tracker.flush()
    tracker.log({"loss": 1.0}, 0)
    tracker.finish()
    assert steps(client, run, "loss") == [0]


@pytest.mark.slow  # starts a process that imports MLflow
def test_another_process_writes_into_the_same_run(client, run):
    program = (
        "import pickle, sys; handle = pickle.load(sys.stdin.buffer)\n"
        "from pipelines.tracking import Tracker\n"
        "tracker = Tracker(handle); tracker.log({'loss': 0.5}, 7); tracker.close()\n"
    )
    import pickle

    subprocess.run([sys.executable, "-c", program], input=pickle.dumps(run), check=True)
    assert steps(client, run, "loss") == [7]
    (experiment,) = [client.get_experiment_by_name("test").experiment_id]
    runs = client.search_runs([experiment], filter_string="attributes.run_name = 'r'")
    assert run.run_id in [found.info.run_id for found in runs]


def test_a_server_that_is_down_is_one_line_before_the_run(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="no server answers there"):
        open_run("test", None, run_name="r", params={}, tags={})


def test_a_server_that_goes_down_does_not_stop_the_run(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    received, is_up = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if is_up.is_set() else 503)
            self.end_headers()
            self.wfile.write(b"{}")
            if is_up.is_set():
                received.extend(body.get("metrics", []))

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = RunHandle(f"http://127.0.0.1:{server.server_port}", "0" * 32)
    tracker = Tracker(run, skip_logged=False)
    tracker.log({"loss": 1.0}, 0)
    assert not tracker.flush()
    tracker.log({"loss": 0.5}, 1)
    is_up.set()
    tracker.close()
    server.shutdown()
    server.server_close()
    assert [(point["value"], point["step"]) for point in received] == [(1.0, 0), (0.5, 1)]
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def start_server(store: Path, port: int) -> psutil.Popen:
    """Start a real server over the file's own store; wait until it answers."""
    server, log = start_mlflow(store, port)
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(InputError):
            tracking.check_server(f"http://127.0.0.1:{port}")
            return server
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_real_server_that_is_killed_and_started_again_misses_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    server = start_server(store, port)
    try:
        run = open_run("served", tmp_path, run_name="r", params={}, tags={})
        tracker = Tracker(run)
        for step in range(50):
            tracker.log({"loss": 1 / (step + 1)}, step)
        assert tracker.flush()
        kill_session(server)
        for step in range(50, 100):
            tracker.log({"loss": 1 / (step + 1)}, step)
        tracker.log_dict({"while": "down"}, "note.json")
        assert not tracker.flush()
        assert [point["step"] for point in tracker.unsent()] == list(range(50, 100))

        server = start_server(store, port)
        for step in range(100, 150):
            tracker.log({"loss": 1 / (step + 1)}, step)
        tracker.finish()

        client = MlflowClient(run.uri)
        assert steps(client, run, "loss") == list(range(150))
        assert [file.path for file in client.list_artifacts(run.run_id)] == ["note.json"]
        assert client.get_run(run.run_id).info.status == "FINISHED"
    finally:
        kill_session(server)
    said = [record.message for record in caplog.records if "MLflow at" in record.message]
    assert len(said) == 2
    assert "the run goes on and sends later" in said[0]
    assert said[1].endswith("answers again")
