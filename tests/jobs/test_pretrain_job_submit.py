"""A training submitted to a cluster as the README says, on a Ray of its own beside all others."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from albef_core.weights import load_model
from tests.conftest import SmallCorpus

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60
NOT_UPLOADED = {".git", ".venv", "__pycache__", "mlflow.db", "runs", "tests", "docs"}


@dataclass(frozen=True)
class Cluster:
    """A Ray head that takes jobs."""

    address: str
    scratch: Path
    """Ray's own folder, with the working directories that were uploaded."""
    mlflow_uri: str


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Start a Ray head on ports of its own; stop that one, and no other on the machine."""
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    dashboard = free_port()
    flags = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "temp-dir": scratch,
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 300_000_000,
        "include-dashboard": "true",
    }
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in flags.items()],
            env=clean_environment() | {"MLFLOW_TRACKING_URI": uri},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_port(dashboard, head, tmp_path / "ray.log")
        yield Cluster(f"http://127.0.0.1:{dashboard}", scratch, uri)
    finally:
        stop(head, scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def clean_environment() -> dict[str, str]:
    """Give the environment of a shell that knows no other Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, head: subprocess.Popen, log: Path) -> None:
    for _ in range(START_TIMEOUT_S * 5):
        assert head.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def stop(head: subprocess.Popen, scratch: Path) -> None:
    """Kill what belongs to this head: its session, and whatever names its scratch folder."""
    for pid in {head.pid} | processes_of(head.pid, scratch):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()


def processes_of(session: int, scratch: Path) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with contextlib.suppress(OSError):
            names_it = str(scratch).encode() in (entry / "cmdline").read_bytes()
            if pid != os.getpid() and (names_it or os.getsid(pid) == session):
                found.add(pid)
    return found


@pytest.mark.cluster
@pytest.mark.slow
def test_a_submitted_training_ends_with_a_run_and_a_model(
    cluster: Cluster, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    training = ["python", "jobs/pretrain.py", "tiny", "--corpus", str(small_corpus.folder)]
    training += ["--storage", str(tmp_path / "runs"), "--name", "submitted"]
    training += ["--steps", "2", "--batch-size", "8", "--workers", "1", "--log-every", "1"]
    training += ["--image-size", "32", "--image-layers", "1", "--num-slots", "16"]

    submit = [BIN / "ray", "job", "submit", "--address", cluster.address, "--working-dir", "."]
    process = subprocess.run(
        [*submit, "--", *training],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 0, process.stdout + process.stderr
    assert "jobs/evaluate.py retrieval --model" in process.stdout
    client = MlflowClient(cluster.mlflow_uri)
    experiment = client.get_experiment_by_name("albef-pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("submitted", "FINISHED")
    assert run.data.metrics["pairs_seen"] == 16
    assert load_model(tmp_path / "runs" / "submitted" / "model").report.missing == ()
    (upload,) = cluster.scratch.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert {file.name for file in upload.rglob("*")} & NOT_UPLOADED == set()
    assert sum(file.stat().st_size for file in upload.rglob("*")) < 5e6
