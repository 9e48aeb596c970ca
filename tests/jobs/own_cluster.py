"""A Ray cluster and an MLflow server of a test's own, beside all others on the machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from benchmarks.training_process import descendants, kill_all
from tests.processes import free_port, kill_session, start_mlflow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Cluster:
    """A Ray head that takes jobs and does no work, two nodes that work, and an MLflow server."""

    address: str
    scratch: Path
    """Ray's own folder, with the working directories that were uploaded."""
    mlflow_uri: str
    nodes: tuple[psutil.Popen, psutil.Popen]


@contextlib.contextmanager
def own_cluster(folder: Path) -> Iterator[Cluster]:
    """Start all on ports of their own; stop those, and no other on the machine."""
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    dashboard, port, mlflow_port = free_port(), free_port(), free_port()
    uri = f"http://127.0.0.1:{mlflow_port}"
    mlflow, mlflow_log = start_mlflow(folder, mlflow_port, clean_environment())
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
        RAY_JOB_STOP_WAIT_TIME_S="120",
    )
    nodes: list[psutil.Popen] = []
    try:
        wait_for_port(mlflow_port, mlflow, mlflow_log)
        wait_for_port(dashboard, head, log)
        for number in ("1", "2"):
            # Folders of their own, as machines have: a node that unpacks the working directory
            # again would take it away from under a job of another.
            flags = f"--address=127.0.0.1:{port}", f"--temp-dir={scratch}/{number}"
            nodes += [start_node(log, "--num-cpus=2", *flags)]
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_nodes(address, (head, *nodes), log)
        yield Cluster(address, scratch, uri, (nodes[0], nodes[1]))
    finally:
        for process in (*nodes, head):
            kill(process)
        kill_session(mlflow)
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
        # Two nodes of one machine would end and start their task processes all the time.
        "RAY_kill_idle_workers_interval_ms": "0",
        "OMP_NUM_THREADS": "1",
    }


def wait_for_port(port: int, process: psutil.Popen, log: Path) -> None:
    for _ in range(START_TIMEOUT_S * 5):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def wait_for_nodes(address: str, processes: Sequence[psutil.Popen], log: Path) -> None:
    """Wait until all have joined: a node gives up by itself where the machine is too busy."""
    for _ in range(START_TIMEOUT_S * 2):
        assert all(process.poll() is None for process in processes), log.read_text()
        if len(list_nodes(address, filters=[("state", "=", "ALIVE")])) == len(processes):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def kill(process: psutil.Popen) -> None:
    """Kill -9 a process with all that it started."""
    kill_all([*descendants(process), process])
    process.wait()


def processes_of(scratch: Path) -> set[int]:
    """List what a node has left running: it names the scratch folder."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(scratch).encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found - {os.getpid()}


def submit(cluster: Cluster, job: str, *, name: str = "") -> psutil.Popen:
    """Run `ray job submit -- python jobs/...` from a clone, as the docs say."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.address]
    command += ["--submission-id", name] if name else []
    return psutil.Popen(
        [*command, "--working-dir", ".", "--", "python", *job.split()],
        env=clean_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_job(cluster: Cluster, entrypoint: str) -> str:
    """Submit by Ray's client, which costs no process; wait for a good end, give the log."""
    client = JobSubmissionClient(cluster.address)
    job = client.submit_job(
        entrypoint=f"python {entrypoint}", runtime_env={"working_dir": str(ROOT)}
    )
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    assert status == JobStatus.SUCCEEDED, client.get_job_logs(job)
    return client.get_job_logs(job)
