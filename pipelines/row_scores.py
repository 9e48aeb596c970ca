"""What an evaluation gave each row, kept with its run: two models are compared on the same rows."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from albef_core.paired import hit_shares
from pipelines.evaluation_config import EvaluateConfig, EvaluateGroundingConfig, EvaluateTaskConfig
from pipelines.model_card import model_digest
from pipelines.retrieval_findings import Scores
from pipelines.tracking import RunHandle, Tracker, fetch_artifact

FOLDER = "rows"
KEYS = ("key", "image_id", "part")
"""Columns beside the scores, one a metric: the row's name in the corpus, the picture whose rows
stand or fall together, and the part whose mean counts like that of any other part."""
SETTINGS = {
    EvaluateConfig: ("top_k", "image_size"),
    EvaluateTaskConfig: ("answers", "top_k", "num_beams"),
    EvaluateGroundingConfig: ("by", "layer", "head", "sweep"),
}
"""Fields of an evaluation that scores depend on."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was evaluated, on what, and how: equal subjects have equal scores."""

    task: str
    model_sha256: str
    corpus_id: str
    settings: dict[str, Any]

    @property
    def path(self) -> str:
        """Name the artifact of the scores."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{FOLDER}/{self.task}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.parquet"


def subject_of(
    task: str,
    config: EvaluateConfig | EvaluateTaskConfig | EvaluateGroundingConfig,
    *,
    model: Path,
    corpus_id: str,
) -> Subject:
    """Identify an evaluation before it is made."""
    settings = {name: getattr(config, name) for name in SETTINGS[type(config)]}
    if isinstance(config, EvaluateTaskConfig) and config.answer_list is not None:
        settings["answer_list"] = hashlib.sha256(config.answer_list.read_bytes()).hexdigest()
    return Subject(
        task=task, model_sha256=model_digest(model), corpus_id=corpus_id, settings=settings
    )


def retrieval_rows(
    stages: Mapping[str, Scores], image_ids: Sequence[str], image_of_text: NDArray[np.int64]
) -> pa.Table:
    """Make rows of both directions; the mean over directions of their means is mean recall."""
    first = np.searchsorted(image_of_text, np.arange(len(image_ids)))
    places = np.arange(len(image_of_text)) - first[image_of_text]
    of_texts = [image_ids[image] for image in image_of_text]
    texts = [f"{name} {place}" for name, place in zip(of_texts, places, strict=True)]
    columns: dict[str, Any] = {
        "key": [*image_ids, *texts],
        "image_id": [*image_ids, *of_texts],
        "part": ["image to text"] * len(image_ids) + ["text to image"] * len(texts),
    }
    for stage, scores in stages.items():
        columns[stage] = np.concatenate(hit_shares(*scores, image_of_text))
    return pa.table(columns)


def example_rows(
    scores: Mapping[str, NDArray[np.floating]],
    image_ids: Sequence[str],
    numbers: Sequence[int] | NDArray[np.int64],
) -> pa.Table:
    """Make rows of examples by their number in the corpus; NaN: the metric does not apply."""
    names = [f"{name} {number}" for name, number in zip(image_ids, numbers, strict=True)]
    columns: dict[str, Any] = {
        "key": names,
        "image_id": list(image_ids),
        "part": [""] * len(names),
    }
    return pa.table(columns | {name: values.astype(float) for name, values in scores.items()})


def log_rows(tracker: Tracker, rows: pa.Table, subject: Subject) -> None:
    """Store rows with a run; what was evaluated is in the file's metadata."""
    told = {"subject": json.dumps(asdict(subject))}
    with tempfile.TemporaryDirectory(prefix="albef-rows-") as scratch:
        file = Path(scratch) / "rows.parquet"
        pq.write_table(rows.replace_schema_metadata(told), file)
        tracker.log_artifact(file, subject.path)


def read_rows(run: RunHandle, subject: Subject) -> pa.Table | None:
    """Read the rows that an evaluation of this subject has left in a run; None: there are none."""
    with tempfile.TemporaryDirectory(prefix="albef-rows-") as scratch:
        file = fetch_artifact(run, subject.path, Path(scratch))
        return None if file is None else pq.read_table(file)
