"""Processes of a test: workers that start at once, and MLflow servers of its own."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from torch.multiprocessing.spawn import start_processes


def start_workers(work: Callable[..., None], *args: Any, num: int) -> None:
    """Run `work(rank, *args)` in so many processes; what one raises is raised here.

    They are forked from one that has imported torch for all.
    """
    multiprocessing.set_forkserver_preload(
        ["torch", "torch.distributed", "albef_core.pretraining", "albef_core.tasks.folder"]
    )
    start_processes(work, args=args, nprocs=num, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_mlflow(
    folder: Path, port: int, env: Mapping[str, str] = os.environ
) -> tuple[psutil.Popen, Path]:
    """Start a server over the SQLite store of a folder; it keeps artifacts itself.

    Returns:
        The process, which has a session of its own, and its log.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "served")]
    log = folder / "mlflow.log"
    with log.open("a") as file:
        process = psutil.Popen(
            command, env=dict(env), cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
    return process, log


def kill_session(process: psutil.Popen) -> None:
    """Kill -9 a process that has a session of its own, with all of that."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
