"""The whole pipeline once, small: generate, ingest, pre-train, evaluate, register."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from albef_core.errors import InputError
from albef_core.metrics import Estimate
from pipelines.cluster import connect
from pipelines.config import EvaluateConfig, IngestConfig, QuickstartConfig
from pipelines.evaluate import evaluate_retrieval
from pipelines.ingest import ingest
from pipelines.presets import tiny
from pipelines.train import pretrain

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

MARK = "made-by-quickstart"
"""File by which a later quickstart knows that it may replace the folder."""
HELD_OUT_SEED = 1_000_003
"""Added to the seed for the pictures of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class QuickstartSummary:
    """What `summary.json` holds."""

    seconds: dict[str, float]
    """By stage, and `total`."""
    metrics: dict[str, dict[str, Estimate]]
    """Shares of 1 with 95 % interval and chance: `itc` alone, and `itm` over the top k."""
    mean_recall: float
    """Of the better stage, over R@1/5/10 both ways."""
    chance: float
    """Mean recall of guessing."""
    times_chance: float
    num_held_out: int
    corpus_id: str
    held_out_corpus_id: str
    run_id: str
    tracking_uri: str
    model_uri: str
    """The registered model."""
    folders: dict[str, str]


def quickstart(config: QuickstartConfig) -> QuickstartSummary:
    """Run every stage and write `summary.json`.

    Raises:
        InputError: the folder exists and was not made by a quickstart.
    """
    out = config.out.absolute()
    _clear(out)
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Result]) -> Result:
        logger.info("quickstart: %s", name)
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    stage("start Ray", connect)
    train = stage("ingest", lambda: ingest(_pictures(config, out / "corpus", held_out=False)))
    held_out = stage("ingest held out", lambda: ingest(_pictures(config, out / "held-out")))
    preset = tiny()
    run = stage(
        "pre-train and register",
        lambda: pretrain(
            replace(
                preset,
                corpus=train.folder,
                storage=out / "runs",
                name="quickstart",
                steps=config.steps,
                epochs=None,
                batch_size=config.batch_size,
                workers=config.workers,
                seed=config.seed,
                experiment="albef-quickstart",
            )
        ),
    )
    found = stage(
        "evaluate",
        lambda: evaluate_retrieval(
            EvaluateConfig(
                model=str(run.model), corpus=held_out.folder, json=out / "retrieval.json", top_k=16
            )
        ),
    )
    seconds["total"] = round(sum(seconds.values()), 1)
    best = max((stage["mean_recall"] for stage in found.metrics.values()), key=lambda e: e.value)
    summary = QuickstartSummary(
        seconds=seconds,
        metrics=found.metrics,
        mean_recall=best.value,
        chance=best.chance,
        times_chance=round(best.value / best.chance, 2),
        num_held_out=found.num_images,
        corpus_id=run.corpus_id,
        held_out_corpus_id=found.corpus_id,
        run_id=run.handle.run_id,
        tracking_uri=run.handle.uri,
        model_uri=run.stored.uri,
        folders={
            "corpus": str(train.folder),
            "held_out": str(held_out.folder),
            "run": str(run.run_dir),
            "model": str(run.model),
            "retrieval": str(out / "retrieval.json"),
        },
    )
    (out / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise InputError(
                f"--out {out}: holds files that no quickstart made."
                " Name another folder, or empty this one yourself."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _pictures(config: QuickstartConfig, folder: Path, *, held_out: bool = True) -> IngestConfig:
    return IngestConfig(
        source="shapes",
        out=folder,
        num_images=config.num_held_out if held_out else config.num_images,
        seed=config.seed + (HELD_OUT_SEED if held_out else 0),
    )
