"""A model on a task, with intervals and the chance level: zero-shot image-text retrieval."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from albef_core.captions import clean_caption
from albef_core.errors import InputError
from albef_core.metrics import Estimate, retrieval_metrics
from pipelines import tracking
from pipelines.cluster import pick_device
from pipelines.config import EvaluateConfig
from pipelines.config_file import write_config
from pipelines.judge import Judge, Scores
from pipelines.manifest import Manifest, read_columns, read_manifest
from pipelines.model_store import find_model, is_model_uri
from pipelines.pictures import decoded_blocks
from pipelines.report import recall_figure

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all (0: not known)."""
POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """All that an evaluation found, as it is written with `--json`; recalls are shares of 1."""

    model: str
    corpus: str
    corpus_name: str
    """The corpus folder's own name: metrics are logged under it."""
    corpus_id: str
    metrics: dict[str, dict[str, Estimate]]
    """By stage, `itc` alone and `itm` over the top k: `tr_r1` to `ir_r10`, and `mean_recall`."""
    top_k: int
    num_images: int
    """Pictures that were queries and candidates."""
    num_texts: int
    """Captions that were queries and candidates."""
    undecodable: tuple[str, ...]
    """Ids of pictures that do not decode; left out with their captions."""
    without_text: tuple[str, ...]
    """Ids of pictures without any usable caption; left out."""
    num_empty_captions: int
    """Captions of which cleaning leaves nothing; left out."""
    device: str
    seconds: dict[str, float]
    """By stage."""
    tracking_uri: str
    run_id: str

    def write(self, path: Path) -> None:
        """Write everything as JSON, with the numbers of pictures left out beside their names."""
        counts = {
            "num_undecodable": len(self.undecodable),
            "num_without_text": len(self.without_text),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self) | counts, indent=1) + "\n")


def evaluate_retrieval(
    config: EvaluateConfig, *, on_progress: OnProgress = lambda stage, done, total: None
) -> RetrievalResult:
    """Measure retrieval on a corpus by ITC alone and with ITM re-ranking (ALBEF section 5).

    Ray tasks decode the pictures, one Ray actor runs the model; Ray must be connected. The metrics
    go into the MLflow run that made the model where that is known, else into a run of their own.

    Raises:
        InputError: model or corpus is absent or damaged, or nothing in the corpus can be used.
    """
    clock = _Clock()
    manifest = read_manifest(config.corpus)
    folder = find_model("--model", config.model)
    seen = _examine(config, manifest, folder, clock, on_progress)
    image_of_text = np.repeat(np.arange(len(seen.shown)), [len(row.texts) for row in seen.shown])
    metrics = {
        stage: retrieval_metrics(
            image_to_text,
            text_to_image,
            image_of_text,
            num_resamples=config.bootstrap,
            seed=config.seed,
        )
        for stage, (image_to_text, text_to_image) in seen.scores.items()
    }
    clock.stop("metrics")
    run, is_new = _open_run(config, folder, manifest)
    result = RetrievalResult(
        model=config.model,
        corpus=str(config.corpus),
        corpus_name=tracking.metric_name(config.corpus.resolve().name),
        corpus_id=manifest.content_id,
        metrics=metrics,
        top_k=config.top_k,
        num_images=len(seen.shown),
        num_texts=len(image_of_text),
        undecodable=seen.undecodable,
        without_text=tuple(row.image_id for row in seen.rows if not row.texts),
        num_empty_captions=sum(row.num_empty for row in seen.rows),
        device=pick_device(config.device),
        seconds=clock.seconds,
        tracking_uri=run.uri,
        run_id=run.run_id,
    )
    _log(result, config, run, is_new=is_new)
    if config.json is not None:
        result.write(config.json)
    return result


@dataclass(frozen=True)
class _Row:
    """One image of the corpus, and what is left of its captions."""

    image_id: str
    texts: list[str]
    num_empty: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What became of a corpus in front of a model."""

    rows: list[_Row]
    """All of it."""
    shown: list[_Row]
    """Those with a text and a picture that decodes: the queries and candidates."""
    undecodable: tuple[str, ...]
    scores: dict[str, Scores]
    """By stage."""


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 3), now


def _examine(
    config: EvaluateConfig,
    manifest: Manifest,
    folder: Path,
    clock: _Clock,
    on_progress: OnProgress,
) -> _Seen:
    """Start the model's actor, let it see and read the corpus, and take its scores."""
    device = pick_device(config.device)
    judge: Any = (
        ray.remote(Judge)
        .options(num_cpus=1, num_gpus=int(device == "cuda"), max_concurrency=2)
        .remote(device, config.batch_size)
    )
    try:
        model_config, text_config = _get(judge.load.remote(str(folder)))
        rows = _read_rows(manifest, max_words=text_config.max_words)
        clock.stop("load")
        is_decoded = _show(judge, manifest, rows, model_config.image_size, on_progress)
        clock.stop("images")
        shown = [
            row for row, decoded in zip(rows, is_decoded, strict=True) if row.texts and decoded
        ]
        if not shown:
            raise InputError(
                f"{config.corpus}: none of its {len(rows)} pictures decodes and has a caption."
                " Evaluate on another corpus."
            )
        _get(judge.read.remote([text for row in shown for text in row.texts]))
        clock.stop("texts")
        scores = _score(judge, config.top_k, on_progress)
        clock.stop("scores")
    finally:
        ray.kill(judge)
    undecodable = (row.image_id for row, ok in zip(rows, is_decoded, strict=True) if not ok)
    return _Seen(rows=rows, shown=shown, undecodable=tuple(undecodable), scores=scores)


def _read_rows(manifest: Manifest, *, max_words: int) -> list[_Row]:
    rows = []
    for table in read_columns(manifest, ["image_id", "captions"]):
        columns = (table[name].to_pylist() for name in ("image_id", "captions"))
        for image_id, captions in zip(*columns, strict=True):
            cleaned = [clean_caption(raw, max_words=max_words) for raw in captions]
            texts = [text for text in cleaned if text]
            rows.append(_Row(image_id, texts, len(cleaned) - len(texts)))
    return rows


def _show(
    judge: Any, manifest: Manifest, rows: list[_Row], image_size: int, on_progress: OnProgress
) -> NDArray[np.bool_]:
    """Let the model see every picture that decodes and has text; tell which rows decode."""
    has_text = np.array([bool(row.texts) for row in rows])
    is_decoded = np.zeros(len(rows), dtype=bool)
    _get(judge.expect.remote(int(has_text.sum())))
    num_seen, encoding = 0, None
    for block in decoded_blocks(manifest, image_size=image_size):
        places = slice(num_seen, num_seen + len(block["image_id"]))
        ids = [row.image_id for row in rows[places]]
        assert block["image_id"].tolist() == ids, "blocks arrive whole and in order"
        is_decoded[places] = block["is_decoded"]
        if encoding is not None:
            _get(encoding)  # the tasks hold back while one block waits for the model
        encoding = judge.show.remote(block["image"][(is_decoded & has_text)[places]])
        num_seen = places.stop
        on_progress("images", num_seen, len(rows))
    assert num_seen == len(rows), f"{len(rows) - num_seen} rows of the corpus never came"
    if encoding is not None:
        _get(encoding)
    return is_decoded


def _score(judge: Any, top_k: int, on_progress: OnProgress) -> dict[str, Scores]:
    scores = judge.score.remote(top_k)
    while not ray.wait([scores], timeout=POLL_S)[0]:
        on_progress("pairs", *_get(judge.progress.remote()))
    return _get(scores)


def _get(reference: Any) -> Any:
    """Fetch a remote result; the user's mistake arrives as it was raised there."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def _open_run(
    config: EvaluateConfig, folder: Path, manifest: Manifest
) -> tuple[tracking.RunHandle, bool]:
    return tracking.run_of_model(
        folder,
        config.experiment,
        run_name=f"retrieval-{tracking.metric_name(config.corpus.resolve().name)}",
        params=config,
        tags={"corpus.id": manifest.content_id, "model": config.model, "seed": str(config.seed)},
    )


def _with_absolute_names(config: EvaluateConfig) -> EvaluateConfig:
    is_uri = is_model_uri(config.model)
    model = config.model if is_uri else str(Path(config.model).absolute())
    return replace(config, model=model, corpus=config.corpus.absolute())


def _log(
    result: RetrievalResult, config: EvaluateConfig, run: tracking.RunHandle, *, is_new: bool
) -> None:
    """Log the re-ranked metrics as `eval/<corpus>/...`, those by ITC as `eval/<corpus>/itc/...`."""
    folder = f"eval/{result.corpus_name}"
    points: dict[str, float] = {}
    for stage, prefix in (("itm", folder), ("itc", f"{folder}/itc")):
        for name, estimate in result.metrics[stage].items():
            points[f"{prefix}/{name}"] = estimate.value
            points[f"{prefix}/{name}_low"] = estimate.low
            points[f"{prefix}/{name}_high"] = estimate.high
    for name, estimate in result.metrics["itm"].items():
        points[f"{folder}/{name}_chance"] = estimate.chance
    tracker = tracking.Tracker(run, skip_logged=False)
    tracker.log(points, step=0)
    tracker.log_dict(asdict(result), f"{folder}/retrieval.json")
    with tempfile.TemporaryDirectory(prefix="albef-evaluate-") as scratch:
        # Not config.json: in a training's run that is the training's.
        write_config(_with_absolute_names(config), Path(scratch) / "evaluate.json")
        tracker.log_artifact(Path(scratch) / "evaluate.json", f"{folder}/evaluate.json")
    tracker.log_figure(recall_figure(result.metrics), f"{folder}/recall.png")
    if is_new:
        tracker.finish()
    else:
        tracker.close()
