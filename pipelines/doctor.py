"""Checks before GPU hours are spent: each a row of pass, warn or fail, with what to do."""

import dataclasses
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import ray

from albef_core.errors import InputError
from albef_core.tokenizer import Tokenizer
from pipelines.cluster import connect
from pipelines.config import PretrainConfig
from pipelines.doctor_cluster import check_nodes
from pipelines.doctor_corpus import (
    check_corpus,
    check_tokenizer,
    learn_tokenizer,
    open_tokenizer,
)
from pipelines.doctor_finding import Finding, Problem
from pipelines.doctor_mlflow import check_tracking
from pipelines.doctor_storage import check_storage
from pipelines.doctor_training import check_numbers, check_rates, check_room, check_weights
from pipelines.doctor_worker import TrialWorker
from pipelines.manifest import Manifest, check_captioned, read_manifest
from pipelines.resources import use_gpu
from pipelines.start import prepare_start

logger = logging.getLogger(__name__)

BUDGET_S = 110.0
"""Seconds for all checks; what does not get its turn is a warning."""
LEAST_S = 2.0
REPORT = "doctor.json"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings of one examination."""

    findings: list[Finding]
    seconds: float
    report: Path | None
    """Where they lie as JSON; None where the storage cannot be written."""

    @property
    def has_failed(self) -> bool:
        """Tell whether a training should not start."""
        return any(finding.verdict == "fail" for finding in self.findings)


def examine(
    config: PretrainConfig,
    *,
    budget_s: float = BUDGET_S,
    on_check: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Check what a pre-training with this config needs, without starting it.

    A check that fails, raises or hangs is one row; what it leaves undone is stood in for, so that
    the others tell something of their own. `doctor.json` goes into the run's folder where there is
    one, else into the storage.

    Args:
        config: of the pre-training.
        budget_s: seconds for all checks together.
        on_check: is told the name of each check as it begins.

    Raises:
        InputError: there is no corpus, or pictures of it have no caption.
    """
    started = time.monotonic()
    config = dataclasses.replace(
        config, corpus=config.corpus.absolute(), storage=config.storage.absolute()
    )
    check_captioned(manifest := read_manifest(config.corpus))
    connect()
    findings = []
    with _scratch_folder(config.storage) as scratch:
        patient = Patient(config, manifest, scratch)
        for name, limit_s, check in patient.checks():
            on_check(name)
            left_s = started + budget_s - time.monotonic()
            findings.append(_run(name, check, patient, limit_s=min(limit_s, left_s)))
        patient.dismiss_worker()
    seconds = time.monotonic() - started
    return Diagnosis(
        findings=findings, seconds=seconds, report=_write_report(config, findings, seconds)
    )


class Patient:
    """What the checks look at, and a trial config in which earlier troubles are stood in for."""

    def __init__(self, config: PretrainConfig, manifest: Manifest, scratch: Path) -> None:
        self.asked, self.manifest, self.scratch = config, manifest, scratch
        self.trial = _small_enough(config, manifest.num_images)
        self.start: Path | None = None
        self._worker: Any = None

    def checks(self) -> list[tuple[str, float, Callable[[], Finding]]]:
        """List the checks in their order: name, seconds it may take, function."""
        return [
            ("corpus", 20, lambda: check_corpus(self.asked, self.manifest)),
            ("tokenizer", 30, self.look_at_tokenizer),
            ("starting weights", 60, self.look_at_weights),
            ("storage", 20, lambda: check_storage(self.trial)),
            ("MLflow", 30, lambda: check_tracking(self.asked)),
            ("workers", 30, self.look_at_nodes),
            ("largest batch", 45, lambda: check_room(self.worker(), self.trial)),
            (
                "feed and step",
                45,
                lambda: check_rates(self.worker(), self.trial, self.manifest.num_images),
            ),
            ("NaN", 30, lambda: check_numbers(self.worker(), self.trial)),
        ]

    def look_at_tokenizer(self) -> Finding:
        """Open and check the tokenizer; the trial takes it too, or a learned one in its place."""
        vocab_size = self.trial.model.vocab_size
        try:
            tokenizer, num_words = open_tokenizer(self.asked, self.manifest)
        except InputError as error:
            self._take(learn_tokenizer(self.asked, self.manifest), vocab_size)
            return _refusal(error)
        self._take(tokenizer, vocab_size if tokenizer.vocab_size <= num_words else 0)
        return check_tokenizer(tokenizer, num_words, self.asked, self.manifest)

    def look_at_weights(self) -> Finding:
        """Make the starting model; where that is refused, the trial starts at random."""
        start = self.asked.storage / self.asked.name / "start"
        if not (start / "config.json").is_file():
            start = self.scratch / "start"
        try:
            self.trial, tags = prepare_start(self.trial, self.manifest, start)
            self.start = start
        except InputError as error:
            self._start_at_random()
            return _refusal(error)
        return check_weights(self.asked, tags)

    def look_at_nodes(self) -> Finding:
        """Compare the nodes, and the resources that a training would be given."""
        finding = check_nodes(self.asked)
        try:
            use_gpu(self.asked)
        except InputError as error:
            remedy = f"{error} {finding.remedy}".rstrip()
            return dataclasses.replace(finding, verdict="fail", remedy=remedy)
        return finding

    def worker(self) -> Any:
        """Give the trial worker, an actor with the resources of a train worker."""
        if self._worker is None:
            if self.start is None:
                self._start_at_random()
            has_gpus = self.asked.device != "cpu" and ray.cluster_resources().get("GPU", 0)
            num_gpus = self.asked.gpus_per_worker if has_gpus else 0
            actor = ray.remote(TrialWorker).options(
                num_cpus=self.asked.worker_cpus, num_gpus=num_gpus
            )
            self._worker = actor.remote(self.trial, self.start, use_gpu=num_gpus > 0)
        return self._worker

    def dismiss_worker(self) -> None:
        """End the trial worker, also one that hangs; the next check gets a new one."""
        if self._worker is not None:
            ray.kill(self._worker)
        self._worker = None

    def _take(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        folder = self.scratch / "tokenizer"
        tokenizer.save(folder)
        self.trial = dataclasses.replace(
            self.trial,
            text=dataclasses.replace(self.trial.text, tokenizer=str(folder)),
            model=dataclasses.replace(self.trial.model, vocab_size=vocab_size),
        )

    def _start_at_random(self) -> None:
        if not (self.scratch / "tokenizer").is_dir():
            self._take(learn_tokenizer(self.asked, self.manifest), 0)
        trial = dataclasses.replace(
            self.trial, init="", image_weights="random", text_weights="random"
        )
        start = self.scratch / "random-start"
        self.trial, _tags = prepare_start(trial, self.manifest, start)
        self.start = start


def _small_enough(config: PretrainConfig, num_images: int) -> PretrainConfig:
    """Cut the batch where the corpus does not fill it, which its own check complains about."""
    if config.batch_size <= num_images:
        return config
    workers = min(config.workers, max(1, num_images // 2))
    return dataclasses.replace(config, batch_size=num_images, workers=workers, min_workers=None)


def _run(name: str, check: Callable[[], Finding], patient: Patient, *, limit_s: float) -> Finding:
    """Run one check in a thread of its own, so that one that hangs is left behind."""
    started = time.monotonic()
    future: Future[Finding] = Future()

    def run() -> None:
        try:
            future.set_result(check())
        except BaseException as error:
            future.set_exception(error)

    if limit_s < LEAST_S:
        late = Problem("warn", "The time was up before its turn: see which check took so long.")
        finding = Finding.of("not looked at", [late])
    else:
        Thread(target=run, name=f"doctor: {name}", daemon=True).start()
        try:
            finding = future.result(timeout=limit_s)
        except TimeoutError:
            patient.dismiss_worker()
            slow = "What it waits for is too slow or does not answer: mend that first."
            finding = Finding.of(f"no answer within {limit_s:.0f} s", [Problem("fail", slow)])
        except Exception as error:
            patient.dismiss_worker()
            finding = _refusal(error)
    return dataclasses.replace(finding, check=name, seconds=time.monotonic() - started)


def _refusal(error: Exception) -> Finding:
    """Turn what a check raised into a row: an InputError says itself what to do."""
    cause = getattr(error, "cause", None) or error  # what Ray wraps
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    if isinstance(cause, InputError):
        return Finding.of("refused", [Problem("fail", " ".join(lines))])
    remedy = "The check itself could not end: mend what it names."
    return Finding.of(f"{type(cause).__name__}: {lines[0]}", [Problem("fail", remedy)])


@contextmanager
def _scratch_folder(storage: Path) -> Iterator[Path]:
    """Give a folder that all nodes see, as they see the storage; where that fails, a local one."""
    try:
        storage.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=storage, prefix=".doctor-"))
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="albef-doctor-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_report(config: PretrainConfig, findings: list[Finding], seconds: float) -> Path | None:
    run_dir = config.storage / config.name
    path = (run_dir if config.name and run_dir.is_dir() else config.storage) / REPORT
    body = {
        "name": config.name,
        "corpus": str(config.corpus),
        "seconds": round(seconds, 1),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    try:
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s: not written (%s)", path, error)
        return None
    return path
