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

import psutil
import pytest
from fsspec.implementations.local import LocalFileSystem
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient

from albef_core.weights import load_model
from benchmarks.training_process import descendants, kill_all
from pipelines.checkpoint_files import read_state
from tests.conftest import SmallCorpus

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60
STEPS, EVERY = 80, 4
NOT_UPLOADED = {".git", ".venv", "__pycache__", "mlflow.db", "runs", "tests", "docs"}


@dataclass(frozen=True)
class Cluster:
    """A Ray head that takes jobs and does no work, and two nodes that work."""

    address: str
    scratch: Path
    """Ray's own folder, with the working directories that were uploaded."""
    mlflow_uri: str
    nodes: tuple[psutil.Popen, psutil.Popen]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start Ray's nodes on ports of their own; stop those, and no other on the machine."""
    folder = tmp_path_factory.mktemp("cluster")
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    dashboard, port = free_port(), free_port()
    uri = f"sqlite:///{folder}/mlflow.db"
    log = folder / "ray.log"
    head = start_node(
        log,
        "--head",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={free_port()}",
        f"--temp-dir={scratch}/0",
        "--dashboard-host=127.0.0.1",
        "--include-dashboard=true",
        "--num-cpus=0",
        MLFLOW_TRACKING_URI=uri,
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3",
        RAY_health_check_period_ms="1000",
    )
    nodes: list[psutil.Popen] = []
    try:
        wait_for_port(dashboard, head, log)
        for number in ("1", "2"):
            # Folders of their own, as machines have: a node that unpacks the working directory
            # again would take it away from under a job of another.
            flags = f"--address=127.0.0.1:{port}", f"--temp-dir={scratch}/{number}"
            nodes += [start_node(log, "--num-cpus=4", *flags)]
        yield Cluster(f"http://127.0.0.1:{dashboard}", scratch, uri, (nodes[0], nodes[1]))
    finally:
        for node in (*nodes, head):
            kill(node)
        for pid in processes_of(scratch):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def start_node(log: Path, *flags: str, **env: str) -> psutil.Popen:
    """Start a node on this machine, with workers' ports that no other node has."""
    shared = ["--block", "--disable-usage-stats", "--num-gpus=0", "--node-ip-address=127.0.0.1"]
    shared += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=300000000"]
    with log.open("a") as file:
        return psutil.Popen(
            [
                *(str(BIN / "ray"), "start", *shared, *flags),
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env=clean_environment() | env,
            cwd=log.parent,
            stdout=file,
            stderr=file,
        )


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


def wait_for_port(port: int, head: psutil.Popen, log: Path) -> None:
    for _ in range(START_TIMEOUT_S * 5):
        assert head.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def kill(node: psutil.Popen) -> None:
    """Kill -9 a node with all that it started."""
    kill_all([*descendants(node), node])
    node.wait()


def processes_of(scratch: Path) -> set[int]:
    """List what a node has left running: it names the scratch folder."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(scratch).encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found - {os.getpid()}


def submit(cluster: Cluster, *job: str) -> psutil.Popen:
    """Run `ray job submit -- python jobs/...` from a clone, as the docs say."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.address]
    return psutil.Popen(
        [*command, "--working-dir", ".", "--", "python", *job],
        env=clean_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_a_submitted_training_outlives_a_node_and_ends_with_a_run_and_a_model(
    cluster: Cluster, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    # So much that a node holds one worker, and two tasks of the feed beside it.
    flags = "--workers 2 --min-workers 1 --worker-cpus 2.4 --feed-cpus 0.8 --placement SPREAD"
    flags += f" --steps {STEPS} --batch-size 8 --log-every 1 --checkpoint-every {EVERY}"
    flags += " --image-size 32 --image-layers 1 --num-slots 16 --name submitted"
    paths = ["--corpus", str(small_corpus.folder), "--storage", str(tmp_path / "runs")]
    run_dir = tmp_path / "runs" / "submitted"
    process = submit(cluster, "jobs/pretrain.py", "tiny", *flags.split(), *paths)

    while process.poll() is None and not list(run_dir.glob("checkpoint-*")):
        time.sleep(0.05)
    kill(cluster.nodes[1])
    output, _ = process.communicate()

    assert process.returncode == 0, output
    assert "jobs/evaluate.py retrieval --model" in output
    assert len(output.splitlines()) < 100, "lines of progress, no bars"
    client = MlflowClient(cluster.mlflow_uri)
    experiment = client.get_experiment_by_name("albef-pretrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("submitted", "FINISHED")
    assert run.data.metrics["pairs_seen"] == 8 * STEPS
    points = client.get_metric_history(run.info.run_id, "train/loss/total")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    last = read_state(LocalFileSystem(), str(run_dir / f"checkpoint-{STEPS:08d}"))
    assert (last.progress.step, last.progress.world_size) == (STEPS, 1)
    assert load_model(run_dir / "model").report.missing == ()
    uploads = list(
        cluster.scratch.glob("*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    )
    files = [file for upload in uploads for file in upload.rglob("*")]
    assert {file.name for file in files} & NOT_UPLOADED == set()
    assert sum(file.stat().st_size for file in files) < 5e6


@pytest.mark.cluster
@pytest.mark.slow
def test_a_refused_job_says_why_and_its_exit_code_is_kept(cluster: Cluster) -> None:
    process = submit(cluster, "jobs/pretrain.py", "tinny", "--corpus", "c")

    output, _ = process.communicate()

    assert "Did you mean tiny?" in output
    assert process.returncode == 1, "Ray makes 1 of every failure"
    jobs = JobSubmissionClient(cluster.address).list_jobs()
    (refused,) = (job for job in jobs if "tinny" in job.entrypoint)
    assert (refused.status, refused.driver_exit_code) == ("FAILED", 2)
