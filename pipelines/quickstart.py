"""The whole pipeline once, small: crawl, ingest, pre-train, evaluate, register, promote."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import ray

from albef_core.errors import InputError, Preempted
from albef_core.metrics import Estimate
from pipelines.cluster import connect
from pipelines.config import PretrainConfig, QuickstartConfig
from pipelines.config_file import write_config
from pipelines.crawl import crawl
from pipelines.crawl_config import CrawlConfig
from pipelines.crawl_ingest import ingest_crawl
from pipelines.crawl_report import CrawlReport
from pipelines.evaluate import OnProgress, RetrievalResult, evaluate_retrieval
from pipelines.evaluation_config import EvaluateConfig
from pipelines.ingest import ingest
from pipelines.ingest_config import CleaningConfig, IngestConfig
from pipelines.model_store import StoredModel
from pipelines.order import steps_per_epoch
from pipelines.presets import tiny
from pipelines.promote import promote
from pipelines.registry_config import Check, Gate, PromoteConfig
from pipelines.shapes_web import shapes_server, write_shapes_list
from pipelines.train import TrainResult, pretrain

logger = logging.getLogger(__name__)

MARK = "made-by-quickstart"
"""File by which a later quickstart knows that it may replace the folder."""
HELD_OUT_SEED = 1_000_003
"""Added to the seed for the pictures of the evaluation."""
HEADLINE = "itm"
"""The stage whose mean recall is the result, named before anything is measured: ITM re-ranking of
the top k, as in the paper. The better of both on the test pictures would be picked by them."""
TOP_K = 16
CONNECTIONS = 32
"""At once to the server of the pictures, which is our own."""
EXPERIMENT = "albef-quickstart"
"""Of all its MLflow runs."""
MODEL = "albef-quickstart"
"""Name in the registry: a quickstart is never weighed against somebody's real champion."""


@contextmanager
def no_bars() -> Iterator[OnProgress]:
    """Show nothing."""
    yield lambda stage, done, total: None


@dataclass(frozen=True, kw_only=True)
class QuickstartSummary:
    """What `summary.json` holds."""

    seconds: dict[str, float]
    """By stage, and `total`."""
    metrics: dict[str, dict[str, Estimate]]
    """Shares of 1 with 95 % interval and chance: `itc` alone, and `itm` over the top k."""
    headline: str
    """The stage that the next three numbers are of."""
    mean_recall: float
    """Over R@1/5/10 both ways."""
    chance: float
    """Mean recall of guessing."""
    times_chance: float
    num_held_out: int
    crawled: dict[str, int]
    """URLs listed, by what became of them; `failed` are the dead links."""
    corpus_id: str
    held_out_corpus_id: str
    run_id: str
    tracking_uri: str
    model_uri: str
    """The registered model."""
    champion_uri: str
    """The champion now: this model, or an earlier one that it is not proven to be better than."""
    promotion: str
    """What became of this model, and why."""
    folders: dict[str, str]


def quickstart(
    config: QuickstartConfig, *, bars: Callable[[], AbstractContextManager[OnProgress]] = no_bars
) -> QuickstartSummary:
    """Run every stage and write `summary.json`.

    `bars` opens what shows the progress of ingest and evaluation; the training shows its own.

    Raises:
        InputError: the flags are impossible, the folder exists and was not made by a quickstart, or
            Ray has other machines.
        Preempted: it was asked to stop.
    """
    try:
        return _run(config, bars)
    except Preempted as stop:
        raise Preempted("stopped: the same command starts the quickstart anew.") from stop


def _run(
    config: QuickstartConfig, bars: Callable[[], AbstractContextManager[OnProgress]]
) -> QuickstartSummary:
    out = config.out.absolute()
    training = _training(config, out)
    steps_per_epoch(config.num_images, config.batch_size)  # refuses more pairs than pictures
    _refuse_other_files(out)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        logger.info("quickstart: %s", name)
        started = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - started, 1)

    with stage("start Ray"):
        connect()
        if sum(node["Alive"] for node in ray.nodes()) > 1:
            raise InputError(
                "the quickstart is for one machine, whose own web server it crawls, and this Ray"
                " has several. Unset RAY_ADDRESS."
            )
    if out.exists():  # empty, or of an earlier quickstart
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    write_config(config, out / "config.json")
    with stage("crawl"):
        crawled = _crawl_shapes(config, out)
    with stage("ingest"), bars() as show:
        train = ingest_crawl(
            _crawled(config, crawled.folder, training.corpus),
            on_progress=partial(show, "pictures to train on"),
        )
    with stage("ingest held out"), bars() as show:
        held_out = ingest(
            IngestConfig(
                source="shapes",
                out=out / "held-out",
                num_images=config.num_held_out,
                seed=config.seed + HELD_OUT_SEED,
            ),
            on_progress=partial(show, "held-out pictures"),
        )
    with stage("pre-train and register"):
        run = pretrain(training)
    with stage("evaluate"), bars() as show:
        found = evaluate_retrieval(
            EvaluateConfig(
                model=str(run.model),
                corpus=held_out.folder,
                json=out / "retrieval.json",
                top_k=TOP_K,
            ),
            on_progress=show,
        )
    with stage("promote"):
        promoted = promote_quickstart(run.stored, held_out.folder, out / "gate.yaml")
    seconds["total"] = round(sum(seconds.values()), 1)
    folders = {
        "crawl": str(crawled.folder),
        "corpus": str(train.folder),
        "held_out": str(held_out.folder),
        "run": str(run.run_dir),
        "model": str(run.model),
        "retrieval": str(out / "retrieval.json"),
        "gate": str(out / "gate.yaml"),
    }
    summary = _summary(
        run, found, promoted, crawled=crawled.states, seconds=seconds, folders=folders
    )
    (out / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def _summary(
    run: TrainResult,
    found: RetrievalResult,
    promoted: tuple[str, str],
    *,
    crawled: dict[str, int],
    seconds: dict[str, float],
    folders: dict[str, str],
) -> QuickstartSummary:
    headline = found.metrics[HEADLINE]["mean_recall"]
    return QuickstartSummary(
        seconds=seconds,
        headline=HEADLINE,
        metrics=found.metrics,
        mean_recall=headline.value,
        chance=headline.chance,
        times_chance=round(headline.value / headline.chance, 2),
        num_held_out=found.num_images,
        crawled=crawled,
        corpus_id=run.corpus_id,
        held_out_corpus_id=found.corpus_id,
        run_id=run.handle.run_id,
        tracking_uri=run.handle.uri,
        model_uri=run.stored.uri,
        champion_uri=promoted[0],
        promotion=promoted[1],
        folders=folders,
    )


def promote_quickstart(stored: StoredModel, held_out: Path, gate: Path) -> tuple[str, str]:
    """Weigh the model by the evaluation just made, as jobs/promote.py does with the same gate.

    Returns:
        URI of the champion now, and what became of this model and why.
    """
    check = Check(task="retrieval", corpus=held_out, metric=HEADLINE, top_k=TOP_K)
    write_config(Gate(model=MODEL, checks=(check,)), gate)  # JSON is YAML
    act = promote(PromoteConfig(gate=gate, candidate=stored.version, why="quickstart"))
    assert act.outcome, "an act that returns is closed"
    if act.decision is None:  # another act is under way
        return f"models:/{MODEL}@champion", f"not promoted: {act.outcome.why}"
    found = act.decision.reasons[0].found
    if act.outcome.result == "done":
        return stored.uri, f"promoted: {found}"
    return f"models:/{MODEL}/{act.decision.champion}", f"not proven to be better: {found}"


def _training(config: QuickstartConfig, out: Path) -> PretrainConfig:
    return replace(
        tiny(),
        corpus=out / "corpus",
        storage=out / "runs",
        name="quickstart",
        steps=config.steps,
        epochs=None,
        batch_size=config.batch_size,
        workers=config.workers,
        seed=config.seed,
        experiment=EXPERIMENT,
        register=MODEL,
    )


def _refuse_other_files(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / MARK).is_file():
        raise InputError(
            f"--out {out}: holds files that no quickstart made."
            " Name another folder, or empty this one yourself."
        )


def _crawl_shapes(config: QuickstartConfig, out: Path) -> CrawlReport:
    """Fetch the pictures to train on from a list of URLs, as those of the web are fetched."""
    source = out / "shapes.tsv"
    with shapes_server() as server:
        write_shapes_list(source, port=server.port, seed=config.seed, num_images=config.num_images)
        asked = CrawlConfig(
            out=out / "crawl",
            source=(str(source),),
            allow_private_hosts=True,
            connections_per_host=CONNECTIONS,
            experiment=EXPERIMENT,
        )
        return crawl(asked).report


def _crawled(config: QuickstartConfig, crawled: Path, folder: Path) -> IngestConfig:
    """Ask for a corpus of all that was fetched: drawings are small, and alike."""
    everything = CleaningConfig(
        min_side=0, max_aspect=0.0, min_words=0, exact_duplicates=False, near_radius=-1
    )
    return IngestConfig(
        source=str(crawled),
        out=folder,
        seed=config.seed,
        cleaning=everything,
        experiment=EXPERIMENT,
    )
