"""The noise audit: which captions of a corpus the model does not believe (Fig. 2 as a tool)."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from albef_core.errors import InputError
from albef_core.metrics import Estimate, auc_estimate
from albef_core.preprocess import decode_image
from albef_core.weights import LoadedModel
from pipelines import tracking
from pipelines.audit_report import Disbelief, disbelief_figure
from pipelines.audit_scores import Judged, Scores, collect, disbelief
from pipelines.audit_words import nearest_captions, unlikeliest_word
from pipelines.cleaning import write_cleaned
from pipelines.config import AuditConfig
from pipelines.config_file import write_config
from pipelines.embedder import Embedding, embedded_tables, load_judge
from pipelines.manifest import Manifest, read_manifest, read_rows
from pipelines.model_store import find_model
from pipelines.pairs import open_corpus

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all."""
SCORES_NAME, PAGE_NAME = "scores.parquet", "worst.png"
RESULT_NAME, CONFIG_NAME = "audit.json", "config.json"
CORPUS_FOLDER, DROPPED_NAME = "corpus", "dropped.parquet"
NUM_WORST = 10
"""Pictures on the page."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """All that an audit found, as `audit.json` holds it."""

    model: str
    judged_by: str
    """`teacher` of a checkpoint, or `model`."""
    corpus: str
    corpus_id: str
    num_pairs: int
    """Captions that were judged, each with its picture."""
    num_undecodable: int
    """Pictures that do not decode; their captions have no score."""
    num_empty_captions: int
    """Captions of which cleaning leaves nothing; without a score."""
    num_wrong: int | None
    """Wrong captions among those judged, where the corpus says which are; else None."""
    auc: dict[str, Estimate]
    """Area under the ROC curve of finding them by `score`, and by `itc` or `itm` alone; empty where
    they are not known."""
    cleaned: str
    """Folder of the cleaned corpus; empty: none."""
    cleaned_id: str
    """Its content id."""
    num_dropped: int
    """Captions left out of it."""
    num_pictures_dropped: int
    """Pictures left out of it, because they have no caption, or none any more."""
    seconds: float
    tracking_uri: str
    run_id: str


def audit(
    config: AuditConfig, *, on_progress: OnProgress = lambda stage, done, total: None
) -> AuditResult:
    """Rank all captions of a corpus by `disbelief`, draw the worst, and leave some out if asked.

    A checkpoint is judged by its teacher. Into `out` go `scores.parquet`, the worst first and those
    without a score last; `worst.png`; `audit.json`; and with `drop_worst` the cleaned corpus, in
    `corpus`, with `report/dropped.parquet`. Holds all embeddings in memory: 1 kB a picture and a
    caption at full size. The numbers go into the MLflow run that made the model where that is
    known, else into a run of their own.

    Raises:
        InputError: model or corpus is absent, damaged or has nothing to judge, or `out` is used.
    """
    started = time.monotonic()
    manifest, folder = read_manifest(config.corpus), find_model("--model", config.model)
    _check(config, manifest)
    loaded, is_teacher = load_judge(folder)
    judged = _judge(config, manifest, folder, loaded, on_progress)
    scores = disbelief(judged, float(loaded.model.temperature.detach()), seed=config.seed)
    if not np.isfinite(scores.score[judged.is_judged]).all():
        raise InputError(
            f"--model {config.model}: gives numbers that are not finite. Audit with another model."
        )
    order = _worst_first(judged, scores)
    wrong = _known_wrong(manifest)[judged.row]
    table = _table(judged, scores)
    config.out.mkdir(parents=True, exist_ok=True)
    write_config(config, config.out / CONFIG_NAME)
    pq.write_table(table.take(order), config.out / SCORES_NAME)
    cleaned = _clean(config, manifest, judged, order, table)
    run, is_new = tracking.run_of_model(
        folder,
        config.experiment,
        run_name=f"audit-{tracking.metric_name(config.corpus.resolve().name)}",
        params=config,
        tags={"corpus.id": manifest.content_id, "model": config.model, "seed": str(config.seed)},
    )
    is_known = judged.is_judged & ~np.isnan(wrong)
    result = AuditResult(
        model=config.model,
        judged_by="teacher" if is_teacher else "model",
        corpus=str(config.corpus),
        corpus_id=manifest.content_id,
        num_pairs=int(judged.is_judged.sum()),
        num_undecodable=int((~judged.is_decoded).sum()),
        num_empty_captions=int((~judged.has_words).sum()),
        num_wrong=int(wrong[is_known].sum()) if is_known.any() else None,
        auc=_areas(config, judged, scores, wrong),
        cleaned=str(cleaned.folder) if cleaned else "",
        cleaned_id=cleaned.content_id if cleaned else "",
        num_dropped=manifest.num_captions - cleaned.num_captions if cleaned else 0,
        num_pictures_dropped=manifest.num_images - cleaned.num_images if cleaned else 0,
        seconds=round(time.monotonic() - started, 1),
        tracking_uri=run.uri,
        run_id=run.run_id,
    )
    rows = _page(config, loaded, judged, scores, order, wrong)
    figure = disbelief_figure(rows, num_pairs=result.num_pairs)
    figure.savefig(config.out / PAGE_NAME, bbox_inches="tight", dpi=120)
    (config.out / RESULT_NAME).write_text(json.dumps(asdict(result), indent=1) + "\n")
    with tracking.findings(run, is_new=is_new) as tracker:
        _log(result, config, tracker)
    return result


def _check(config: AuditConfig, manifest: Manifest) -> None:
    if (config.out / RESULT_NAME).exists():
        raise InputError(f"--out {config.out}: holds an audit already. Choose another folder.")
    if config.out.exists() and not config.out.is_dir():
        raise InputError(f"--out {config.out}: is a file. Choose a folder.")
    if not manifest.num_captions:
        raise InputError(
            f"{config.corpus}: has no captions, only annotations. Audit a corpus of captions."
        )


def _judge(
    config: AuditConfig,
    manifest: Manifest,
    folder: Path,
    loaded: LoadedModel,
    on_progress: OnProgress,
) -> Judged:
    embedding = Embedding(
        model=folder,
        batch_size=config.batch_size,
        actors=config.actors,
        device=config.device,
        has_match=True,
    )
    groups = manifest.row_groups()
    tables, num_done = [], 0
    for table in embedded_tables(manifest, groups, embedding, loaded.model_config):
        tables.append(table)
        num_done += len(table)
        on_progress("pictures", num_done, manifest.num_images)
    assert num_done == manifest.num_images, "every row once"
    judged = collect(tables)
    if not judged.is_judged.any():
        raise InputError(
            f"{config.corpus}: none of its {manifest.num_images} pictures decodes and has a"
            " caption. Audit another corpus."
        )
    return judged


def _worst_first(judged: Judged, scores: Scores) -> NDArray[np.int64]:
    """Order the captions: the judged ones by score, equals as in the corpus; then the others."""
    return np.argsort(-np.where(judged.is_judged, scores.score, -np.inf), kind="stable")


def _table(judged: Judged, scores: Scores) -> pa.Table:
    absent = ~judged.is_judged
    return pa.table(
        {
            "image_id": pa.array([judged.image_ids[row] for row in judged.row], pa.string()),
            "caption_number": pa.array(judged.number, pa.int32()),
            "caption": pa.array(judged.captions, pa.string()),
            "itc": pa.array(scores.itc, pa.float32(), mask=absent),
            "itm": pa.array(scores.itm, pa.float32(), mask=absent),
            "score": pa.array(scores.score, pa.float64(), mask=absent),
        }
    )


def _known_wrong(manifest: Manifest) -> NDArray[np.float64]:
    """Read which pictures have captions of another one: 1, 0, or NaN where nothing says so."""
    told = [json.loads(text or "{}") for (text,) in read_rows(manifest, ["annotations"])]
    return np.array([float(one.get("caption_is_wrong", np.nan)) for one in told])


def _areas(
    config: AuditConfig, judged: Judged, scores: Scores, wrong: NDArray[np.float64]
) -> dict[str, Estimate]:
    known = judged.is_judged & ~np.isnan(wrong)
    is_wrong = wrong[known] == 1
    if is_wrong.all() or not is_wrong.any():  # all, where nothing is known
        return {}
    signals = {"score": scores.score, "itc": -scores.itc, "itm": -judged.log_odds}
    return {
        name: auc_estimate(
            signal[known],
            is_wrong,
            judged.row[known],
            num_resamples=config.bootstrap,
            seed=config.seed,
        )
        for name, signal in signals.items()
    }


def _clean(
    config: AuditConfig,
    manifest: Manifest,
    judged: Judged,
    order: NDArray[np.int64],
    table: pa.Table,
) -> Manifest | None:
    if not config.drop_worst:
        return None
    num_judged = int(judged.is_judged.sum())
    worst = order[: round(config.drop_worst * num_judged)]
    dropped: dict[int, list[int]] = {}
    for pair in worst:
        dropped.setdefault(int(judged.row[pair]), []).append(int(judged.number[pair]))
    out = config.out / CORPUS_FOLDER
    (out / "report").mkdir(parents=True, exist_ok=True)
    pq.write_table(table.take(worst), out / "report" / DROPPED_NAME)
    settings = {
        "cleaned_from": manifest.content_id,
        "source": str(config.corpus),
        "model": config.model,
        "drop_worst": config.drop_worst,
        "num_captions_dropped": len(worst),
        "seed": config.seed,
    }
    return write_cleaned(manifest, dropped, out, settings=settings)


def _page(
    config: AuditConfig,
    loaded: LoadedModel,
    judged: Judged,
    scores: Scores,
    order: NDArray[np.int64],
    wrong: NDArray[np.float64],
) -> list[Disbelief]:
    """Show the worst caption of the worst pictures, and what the model would say instead."""
    worst: dict[int, int] = {}
    for pair in order[judged.is_judged[order]]:
        worst.setdefault(int(judged.row[pair]), int(pair))
        if len(worst) == NUM_WORST:
            break
    corpus = open_corpus(config.corpus.absolute())
    loaded.model.eval()
    rows = []
    for row, pair in worst.items():
        image = decode_image(corpus.read(row).image)
        cosines = judged.text_features @ judged.image_features[row]
        cosines[~judged.has_words] = -1
        rows.append(
            Disbelief(
                image=image,
                caption=judged.captions[pair],
                itc=float(scores.itc[pair]),
                itm=float(scores.itm[pair]),
                score=float(scores.score[pair]),
                is_wrong=None if np.isnan(wrong[pair]) else bool(wrong[pair]),
                nearest=nearest_captions(cosines, judged.captions),
                word=unlikeliest_word(loaded, image, judged.captions[pair]),
            )
        )
    return rows


def _log(result: AuditResult, config: AuditConfig, tracker: tracking.Tracker) -> None:
    """Log as `audit/<corpus>/...`: the areas with their ends, and the files of `out`."""
    folder = f"audit/{tracking.metric_name(config.corpus.resolve().name)}"
    points = {f"{folder}/pairs": float(result.num_pairs)}
    for name, found in result.auc.items():
        prefix = f"{folder}/auc" if name == "score" else f"{folder}/{name}/auc"
        points[prefix] = found.value
        points[f"{prefix}_low"], points[f"{prefix}_high"] = found.low, found.high
    tracker.log(points, step=0)
    for name in (RESULT_NAME, PAGE_NAME, CONFIG_NAME):
        tracker.log_artifact(config.out / name, f"{folder}/{name}")
