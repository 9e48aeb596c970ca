"""A model on image-text retrieval under a named protocol, with intervals and the chance level."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from albef_core.captions import clean_caption
from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.metrics import Estimate, retrieval_metrics
from albef_core.preprocess import decode_image
from albef_core.tasks.retrieval import wanted_pairs
from albef_core.weights import is_fine_tuned
from pipelines import tracking
from pipelines.cluster import check_actors, pick_device
from pipelines.config_file import write_config
from pipelines.evaluation_config import EvaluateConfig, Protocol
from pipelines.judge import Judges
from pipelines.manifest import Manifest, read_columns, read_manifest
from pipelines.model_store import find_model, is_model_uri
from pipelines.pairs import open_corpus
from pipelines.pictures import decoded_blocks
from pipelines.report import recall_figure
from pipelines.retrieval_findings import (
    Case,
    Direction,
    Judged,
    SweepPoint,
    caption_slices,
    find_cases,
    sweep,
)
from pipelines.retrieval_report import recall_against_k_figure, retrieval_cases_figure
from pipelines.row_scores import log_rows, retrieval_rows, subject_of

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all (0: not known)."""
NUM_CASES = 3
"""Of each direction, on the page of the worst and on that of the best."""


@dataclass(frozen=True, kw_only=True)
class NamedCase:
    """A query and what came first, by their names in the corpus."""

    direction: Direction
    image_id: str
    """The query, or the image of the query."""
    text: str
    """The query, or of the image's own texts the first."""
    found_image_id: str
    """What came first, or the image of the text that did."""
    found_text: str
    """The text that came first; "" where the query is a text."""
    match: float
    """ITM's probability of what came first."""
    rank: int
    """Of what is true; 0 is first."""


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """All that an evaluation found, as it is written with `--json`; recalls are shares of 1."""

    model: str
    corpus: str
    corpus_name: str
    """The corpus folder's own name: metrics are logged under it."""
    corpus_id: str
    protocol: Protocol
    image_size: int
    """Height and width of the pictures in pixels."""
    metrics: dict[str, dict[str, Estimate]]
    """By stage, `itc` alone and `itm` over the top k: `tr_r1` to `ir_r10`, and `mean_recall`."""
    top_k: int
    num_images: int
    """Pictures that were queries and candidates."""
    num_texts: int
    """Captions that were queries and candidates."""
    num_pairs: int
    """Pairs that ITM judged: one wanted both ways counts once."""
    slices: dict[str, dict[str, Estimate]]
    """`ir_r1`, `ir_r5` and `ir_r10` by ITM, of short, medium and long captions."""
    sweep: tuple[SweepPoint, ...]
    """Mean recall against the number of candidates, where `--sweep-k` asks for it."""
    cases: dict[str, list[NamedCase]]
    """`worst` and `best`: where the model is surest of what it puts first, and wrong or right."""
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

    Ray tasks decode the pictures, Ray actors run the model; Ray must be connected. The metrics
    go into the MLflow run that made the model where that is known, else into a run of their own.

    Raises:
        InputError: model or corpus is absent or damaged, protocol or resolution are not the
            model's, or nothing in the corpus can be used.
    """
    clock = _Clock()
    manifest = read_manifest(config.corpus)
    folder = find_model("--model", config.model)
    protocol = protocol_of(config, folder)
    seen = _examine(config, manifest, folder, clock, on_progress)
    judged, random = seen.judged, {"num_resamples": config.bootstrap, "seed": config.seed}
    owner, scores = judged.image_of_text, judged.scores(config.top_k)
    metrics = {
        "itc": retrieval_metrics(judged.similarity, judged.similarity, owner, **random),
        "itm": retrieval_metrics(*scores, owner, **random),
    }
    texts = [text for row in seen.shown for text in row.texts]
    cases = find_cases(judged, scores, num=NUM_CASES)
    slices = caption_slices(scores[1], owner, texts, **random)
    points = sweep(judged, top_k=config.top_k, **random) if config.sweep_k else []
    clock.stop("metrics")
    run, is_new = _open_run(config, folder, manifest)
    stages = {"itc": (judged.similarity, judged.similarity), "itm": scores}
    rows = retrieval_rows(stages, [row.image_id for row in seen.shown], owner)
    subject = subject_of("retrieval", config, model=folder, corpus_id=manifest.content_id)
    result = RetrievalResult(
        model=config.model,
        corpus=str(config.corpus),
        corpus_name=tracking.metric_name(config.corpus.resolve().name),
        corpus_id=manifest.content_id,
        protocol=protocol,
        image_size=seen.image_size,
        metrics=metrics,
        top_k=config.top_k,
        num_images=len(seen.shown),
        num_texts=len(texts),
        num_pairs=len(judged.pairs),
        slices=slices,
        sweep=tuple(points),
        cases={
            name: [_named(case, seen.shown, texts, owner) for case in some]
            for name, some in cases.items()
        },
        undecodable=seen.undecodable,
        without_text=tuple(row.image_id for row in seen.rows if not row.texts),
        num_empty_captions=sum(row.num_empty for row in seen.rows),
        device=pick_device(config.device),
        seconds=clock.seconds,
        tracking_uri=run.uri,
        run_id=run.run_id,
    )
    with tracking.findings(run, is_new=is_new) as tracker:
        log_rows(tracker, rows, subject)
        _log(result, config, tracker, row_of={r.image_id: r.number for r in seen.shown})
    if config.json is not None:
        result.write(config.json)
    return result


@dataclass(frozen=True)
class _Row:
    """One image of the corpus, and what is left of its captions."""

    number: int
    """Its place in the corpus."""
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
    image_size: int
    judged: Judged


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
    """Start the models' actors, let them see and read the corpus, and take what they judge."""
    device = pick_device(config.device)
    check_actors(config.actors, device)
    judges = Judges(config.actors, device=device, batch_size=config.batch_size)
    try:
        sizes, text_config = judges.load(folder)
        image_size = resolution_of(config, sizes)
        rows = _read_rows(manifest, max_words=text_config.max_words)
        clock.stop("load")
        is_decoded = _show(judges, manifest, rows, image_size, on_progress)
        clock.stop("images")
        shown = [
            row for row, decoded in zip(rows, is_decoded, strict=True) if row.texts and decoded
        ]
        if not shown:
            raise InputError(
                f"{config.corpus}: none of its {len(rows)} pictures decodes and has a caption."
                " Evaluate on another corpus."
            )
        text_features = judges.read([text for row in shown for text in row.texts])
        clock.stop("texts")
        similarity = judges.image_features() @ text_features.T
        pairs = wanted_pairs(torch.from_numpy(similarity), top_k=config.top_k).numpy()
        logits = judges.judge(pairs, on_pairs=partial(on_progress, "pairs"))
        if num_bad := int((~np.isfinite(logits)).any(axis=1).sum()):
            raise InputError(
                f"--model {config.model}: ITM gives no number for {num_bad} of {len(pairs)} pairs:"
                " its training has diverged, or its weights are damaged. Take an earlier model."
            )
        clock.stop("scores")
    finally:
        judges.end()
    undecodable = (row.image_id for row, ok in zip(rows, is_decoded, strict=True) if not ok)
    return _Seen(
        rows=rows,
        shown=shown,
        undecodable=tuple(undecodable),
        image_size=image_size,
        judged=Judged(
            similarity=similarity,
            pairs=pairs,
            logits=logits,
            image_of_text=np.repeat(np.arange(len(shown)), [len(row.texts) for row in shown]),
        ),
    )


def protocol_of(config: EvaluateConfig, folder: Path) -> Protocol:
    """Name the protocol: what the model's folder tells, or what the user says.

    Raises:
        InputError: the two contradict each other, or neither says anything.
    """
    if folder.is_file():
        if config.protocol is None:
            raise InputError(
                f"--model {config.model}: an official checkpoint does not say what it was"
                " fine-tuned on. Add --protocol zero-shot (nothing), zero-shot-after-coco, or"
                " fine-tuned (pairs as those of --corpus)."
            )
        return config.protocol
    is_tuned = is_fine_tuned(folder)
    said = config.protocol or ("fine-tuned" if is_tuned else "zero-shot")
    if is_tuned != (said != "zero-shot"):
        raise InputError(
            f"--protocol {said}: --model {config.model} is"
            f" {'' if is_tuned else 'not '}fine-tuned, as its config.json says."
            " Leave the flag out, or evaluate another model."
        )
    return said


def resolution_of(config: EvaluateConfig, sizes: ModelConfig) -> int:
    """Choose the resolution in pixels; the image encoder interpolates its positions to any.

    Raises:
        InputError: it is not the model's, and that was not asked for; or patches do not fill it.
    """
    size = config.image_size or sizes.image_size
    if size != sizes.image_size and not config.resize_positions:
        raise InputError(
            f"--image-size {size}: --model {config.model} is for {sizes.image_size} pixels."
            " Leave the flag out, or add --resize-positions to interpolate its position"
            " embeddings."
        )
    if size % sizes.patch_size:
        raise InputError(
            f"--image-size {size}: patches of {sizes.patch_size} pixels do not fill it."
            f" Take a multiple of {sizes.patch_size}."
        )
    return size


def _named(case: Case, shown: list[_Row], texts: list[str], owner: NDArray[np.int64]) -> NamedCase:
    is_text = case.direction == "image to text"
    found_image = owner[case.found] if is_text else case.found
    return NamedCase(
        direction=case.direction,
        image_id=shown[case.image].image_id,
        text=texts[case.text],
        found_image_id=shown[found_image].image_id,
        found_text=texts[case.found] if is_text else "",
        match=case.match,
        rank=case.rank,
    )


def _read_rows(manifest: Manifest, *, max_words: int) -> list[_Row]:
    rows = []
    for table in read_columns(manifest, ["image_id", "captions"]):
        columns = (table[name].to_pylist() for name in ("image_id", "captions"))
        for image_id, captions in zip(*columns, strict=True):
            cleaned = [clean_caption(raw, max_words=max_words) for raw in captions]
            texts = [text for text in cleaned if text]
            rows.append(_Row(len(rows), image_id, texts, len(cleaned) - len(texts)))
    return rows


def _show(
    judges: Judges, manifest: Manifest, rows: list[_Row], image_size: int, on_progress: OnProgress
) -> NDArray[np.bool_]:
    """Let the models see every picture that decodes and has text; tell which rows decode."""
    has_text = np.array([bool(row.texts) for row in rows])
    is_decoded = np.zeros(len(rows), dtype=bool)
    judges.expect(int(has_text.sum()))
    num_seen = 0
    for block in decoded_blocks(manifest, image_size=image_size):
        places = slice(num_seen, num_seen + len(block["image_id"]))
        ids = [row.image_id for row in rows[places]]
        assert block["image_id"].tolist() == ids, "blocks arrive whole and in order"
        is_decoded[places] = block["is_decoded"]
        judges.show(block["image"][(is_decoded & has_text)[places]])
        num_seen = places.stop
        on_progress("images", num_seen, len(rows))
    assert num_seen == len(rows), f"{len(rows) - num_seen} rows of the corpus never came"
    return is_decoded


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
    result: RetrievalResult,
    config: EvaluateConfig,
    tracker: tracking.Tracker,
    *,
    row_of: Mapping[str, int],
) -> None:
    """Log the re-ranked metrics as `eval/<corpus>/...`, those by ITC as `eval/<corpus>/itc/...`.

    The protocol is a tag, `eval.<corpus>.protocol`: many evaluations may share the run.
    """
    folder = f"eval/{result.corpus_name}"
    points: dict[str, float] = {}
    for stage, prefix in (("itm", folder), ("itc", f"{folder}/itc")):
        for name, estimate in result.metrics[stage].items():
            points[f"{prefix}/{name}"] = estimate.value
            points[f"{prefix}/{name}_low"] = estimate.low
            points[f"{prefix}/{name}_high"] = estimate.high
    for name, estimate in result.metrics["itm"].items():
        points[f"{folder}/{name}_chance"] = estimate.chance
    tracker.log(points, step=0)
    tracker.tag(f"eval.{result.corpus_name}.protocol", result.protocol)
    tracker.log_dict(asdict(result), f"{folder}/retrieval.json")
    with tempfile.TemporaryDirectory(prefix="albef-evaluate-") as scratch:
        # Not config.json: in a training's run that is the training's.
        write_config(_with_absolute_names(config), Path(scratch) / "evaluate.json")
        tracker.log_artifact(Path(scratch) / "evaluate.json", f"{folder}/evaluate.json")
    tracker.log_figure(recall_figure(result.metrics), f"{folder}/recall.png")
    if result.sweep:
        by_itc = result.metrics["itc"]["mean_recall"]
        tracker.log_figure(recall_against_k_figure(result.sweep, by_itc), f"{folder}/sweep.png")
    corpus = open_corpus(config.corpus.absolute())
    for name, cases in result.cases.items():
        pictures = [
            (
                decode_image(corpus.read(row_of[case.image_id]).image),
                decode_image(corpus.read(row_of[case.found_image_id]).image),
            )
            for case in cases
        ]
        tracker.log_figure(retrieval_cases_figure(name, cases, pictures), f"{folder}/{name}.png")
