"""A training as a user runs it: one command in a process of its own, and what it leaves behind.

It has its own Ray and its own MLflow store, so it may be killed without harm to any other.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from pipelines.checkpoint_store import CheckpointStore

JOBS = Path(__file__).parents[1] / "jobs"
CURVES = ("train/loss/total", "train/loss/itc", "train/loss/itm", "train/loss/mlm")
END_TIMEOUT_S = 600.0
RAY_TIMEOUT_S = 20.0
"""Ray's processes end by themselves when their driver is gone; what stays longer is killed."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One named run in a folder of its own: the same command again goes on with it."""

    root: Path
    corpus: Path
    steps: int
    flags: tuple[str, ...] = ()

    @property
    def run_dir(self) -> Path:
        """Folder of the run, with its checkpoints."""
        return self.root / "runs" / "run"

    @property
    def log(self) -> Path:
        """File with what the commands have said."""
        return self.root / "log.txt"

    def start(self, *flags: str, address: str = "") -> psutil.Popen:
        """Start the command, or start it again; later `flags` win.

        `address` is that of a Ray cluster to join; without one the command starts its own.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(JOBS / "pretrain.py"), "tiny"]
        command += ["--corpus", str(self.corpus), "--storage", str(self.root / "runs")]
        command += ["--name", "run", "--steps", str(self.steps), "--log-every", "1"]
        with self.log.open("a") as log:
            return psutil.Popen(
                [*command, *self.flags, *flags],
                env=self._environment(address),
                cwd=self.root,
                stdout=log,
                stderr=log,
            )

    def end(self, driver: psutil.Popen, *, code: int = 0) -> None:
        """Wait until a command and all that it started are gone.

        Raises:
            RuntimeError: it ended with another exit code.
        """
        family = descendants(driver)
        found = driver.wait(timeout=END_TIMEOUT_S)
        wait_until_gone(family)
        if found != code:
            tail = "\n".join(self.log.read_text().splitlines()[-30:])
            raise RuntimeError(f"exit code {found} instead of {code}, see {self.log}:\n{tail}")

    def newest_step(self) -> int:
        """Give the step of the newest checkpoint, 0 where there is none."""
        return max(self._store().list_steps(), default=0)

    def unfinished_steps(self) -> tuple[int, ...]:
        """List the steps whose checkpoint is being written, or was when its writer died."""
        folders = sorted(self.run_dir.glob(".checkpoint-*.partial"))
        return tuple(int(folder.name.split("-")[1].split(".")[0]) for folder in folders)

    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Read every point of the loss curves from MLflow, in the order of the steps."""
        client = MlflowClient(self._uri)
        (experiment,) = client.search_experiments(filter_string="name = 'albef-pretrain'")
        (run,) = client.search_runs([experiment.experiment_id])
        return {
            name: sorted(
                (p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)
            )
            for name in CURVES
        }

    def tensors(self) -> dict[str, Tensor]:
        """Read every tensor of the last checkpoint: student, teacher, queues and AdamW.

        Raises:
            RuntimeError: the last step has no good checkpoint.
        """
        found = self._store().newest_good()
        if found is None or found.progress.step != self.steps:
            raise RuntimeError(f"{self.run_dir}: no good checkpoint of step {self.steps}")
        tensors: dict[str, Tensor] = {}
        with found.fetch() as folder:
            for name in ("model", "teacher"):
                file = load_file(folder / f"{name}.safetensors")
                tensors |= {f"{name}.{key}": value for key, value in file.items()}
            optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
        for index, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return tensors

    @property
    def _uri(self) -> str:
        return f"sqlite:///{self.root.absolute()}/mlflow.db"

    def _store(self) -> CheckpointStore:
        return CheckpointStore(str(self.run_dir), keep_last=2)

    def _environment(self, address: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        kept |= {"RAY_ADDRESS": address} if address else {}
        return kept | {
            "MLFLOW_TRACKING_URI": self._uri,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def make_corpus(folder: Path, *, num_images: int = 403) -> Path:
    """Generate a small corpus whose size no batch size divides."""
    command = [sys.executable, str(JOBS / "ingest.py"), "--source", "shapes", "--out", str(folder)]
    command += ["--num-images", str(num_images), "--rows-per-shard", "160"]
    subprocess.run([*command, "--rows-per-group", "32"], check=True, stdout=subprocess.DEVNULL)
    return folder


def descendants(driver: psutil.Process) -> list[psutil.Process]:
    """List the processes that a command has started: those of its own Ray, and no other's."""
    try:
        return driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def train_workers(driver: psutil.Process) -> list[psutil.Process]:
    """List the train workers among the processes of a command."""
    found = []
    for process in descendants(driver):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has ended
    return found


def is_writing(process: psutil.Process) -> bool:
    """Tell whether a process has a file of an unfinished checkpoint open."""
    try:
        handles = list(Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:
        return False
    for handle in handles:
        try:
            if handle.readlink().parent.suffix == ".partial":
                return True
        except OSError:
            continue  # closed meanwhile
    return False


def kill_all(processes: list[psutil.Process]) -> None:
    """Kill -9 processes, all before any can react; those that have ended are passed by."""
    for process in processes:
        try:
            process.kill()  # psutil refuses a number that another process has taken since
        except psutil.NoSuchProcess:
            continue


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Wait for processes to end by themselves, then kill those that stay."""
    _, left = psutil.wait_procs(processes, timeout=RAY_TIMEOUT_S)
    kill_all(left)
    psutil.wait_procs(left, timeout=RAY_TIMEOUT_S)
