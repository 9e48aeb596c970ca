"""A fine-tuned model on examples with known answers: accuracy, by slices, with intervals."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from albef_core.captions import length_name
from albef_core.errors import InputError
from albef_core.metrics import Estimate, mean_estimate
from albef_core.preprocess import decode_image
from albef_core.tasks.folder import LoadedTask, load_task
from albef_core.tasks.predict import Answering
from albef_core.tasks.vqa_answers import check_answers
from pipelines import tracking
from pipelines.cluster import check_actors, pick_device
from pipelines.config_file import write_config
from pipelines.evaluation_config import EvaluateTaskConfig
from pipelines.examples import NO_ROW, collect_examples
from pipelines.manifest import read_manifest
from pipelines.model_store import find_model
from pipelines.pairs import open_corpus
from pipelines.pictures import DECODE_CPUS
from pipelines.predictor import predicted_blocks
from pipelines.row_scores import example_rows, log_rows, subject_of
from pipelines.scoring import score_answers, truths_of
from pipelines.task_report import Case, cases_figure, slices_figure

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all."""
NUM_CASES = 6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One example, what was said, and what it is worth."""

    image_id: str
    text: str
    truth: str
    """The class, or the most frequent answer."""
    answer: str
    probability: float
    """The model's own, of its answer."""
    score: float
    """1 right, 0 wrong; in between where annotators disagree."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """All that an evaluation found, as it is written with `--json`; scores are shares of 1."""

    task: str
    model: str
    corpus: str
    corpus_id: str
    accuracy: Estimate
    """`chance` is always saying what is most frequent in this corpus."""
    majority: str
    """What that is."""
    slices: dict[str, Estimate]
    """By class or answer type, and by the text's length."""
    num_examples: int
    num_undecodable: int
    """Examples left out, because a picture does not decode."""
    bad: dict[str, int]
    """Annotations left out, by class."""
    seconds: float
    tracking_uri: str
    run_id: str
    predictions: tuple[Prediction, ...]


def evaluate_task(
    task: str, config: EvaluateTaskConfig, *, on_progress: OnProgress = lambda *_: None
) -> TaskResult:
    """Let a model answer every example of a corpus; Ray must be connected.

    The score of a question with four annotators or more is VQA v2's; with fewer, an answer is right
    that one of them gave.

    Raises:
        InputError: model, corpus or list of answers is absent, damaged, or of another task.
    """
    started = time.monotonic()
    manifest, folder = read_manifest(config.corpus), find_model("--model", config.model)
    loaded = load_tuned(folder, task, config)
    answers = closed_answers(config, loaded)
    collected = collect_examples(manifest, loaded.task)
    table = collected.table
    rows = predict_examples(config, loaded, folder, table, answers, on_progress)
    is_shown = np.array([row["is_shown"] for row in rows])
    answered = [str(row["answer"]) for row in rows]
    scores, majority, blind = _score(loaded.task, table, answered)
    kinds, texts = table["kind"].to_pylist(), table["text"].to_pylist()
    image_of_row = table["row"].to_numpy()

    def estimate(mask: NDArray[np.bool_]) -> Estimate:
        return mean_estimate(
            scores[mask],
            blind[mask],
            image_of_row[mask],
            num_resamples=config.bootstrap,
            seed=config.seed,
        )

    if not is_shown.any():
        raise InputError(f"{config.corpus}: no picture decodes. Evaluate on another corpus.")
    names = [_slices_of(kind, text) for kind, text in zip(kinds, texts, strict=True)]
    slices = {
        name: estimate(mask)
        for name in sorted({name for both in names for name in both})
        if (mask := is_shown & np.array([name in both for both in names])).any()
    }
    name = tracking.metric_name(config.corpus.resolve().name)
    run, is_new = tracking.run_of_model(
        folder,
        config.experiment,
        run_name=f"{task}-{name}",
        params=config,
        tags={"corpus.id": manifest.content_id, "model": config.model, "seed": str(config.seed)},
    )
    corpus = open_corpus(config.corpus.absolute())
    truths = truths_of(loaded.task, table)
    result = TaskResult(
        task=task,
        model=config.model,
        corpus=str(config.corpus),
        corpus_id=manifest.content_id,
        accuracy=estimate(is_shown),
        majority=majority,
        slices=slices,
        num_examples=int(is_shown.sum()),
        num_undecodable=int((~is_shown).sum()),
        bad=collected.bad,
        seconds=round(time.monotonic() - started, 1),
        tracking_uri=run.uri,
        run_id=run.run_id,
        predictions=tuple(
            Prediction(
                image_id=corpus.read(int(image_of_row[n])).image_id,
                text=texts[n],
                truth=truths[n],
                answer=answered[n],
                probability=float(rows[n]["probability"]),
                score=float(scores[n]),
            )
            for n in np.flatnonzero(is_shown)
        ),
    )
    rows = example_rows(
        {"accuracy": scores[is_shown]},
        [prediction.image_id for prediction in result.predictions],
        np.flatnonzero(is_shown),
    )
    subject = subject_of(task, config, model=folder, corpus_id=manifest.content_id)
    with tracking.findings(run, is_new=is_new) as tracker:
        log_rows(tracker, rows, subject)
        _log(result, config, tracker, examples=table.filter(pa.array(is_shown)))
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def load_tuned(folder: Path, task: str, config: EvaluateTaskConfig) -> LoadedTask:
    """Load the model of `--model`, found in `folder`.

    Raises:
        InputError: it is damaged, or of another task.
    """
    loaded = load_task(folder)
    if loaded.task != task:
        raise InputError(
            f"--model {config.model}: is fine-tuned for {loaded.task}, not for {task}."
            f" Give a model fine-tuned for {task}."
        )
    return loaded


def closed_answers(config: EvaluateTaskConfig, loaded: LoadedTask) -> tuple[str, ...]:
    """Read the list of `--answer-list`; empty where the model's own is to be taken.

    Raises:
        InputError: it is no list of different answers, or there is neither.
    """
    if loaded.task != "vqa":
        return ()
    if config.answer_list is None:
        if not loaded.answers and config.answers == "closed":
            raise InputError(
                f"--model {config.model}: an official file, which holds no list of answers. Pass"
                " --answer-list FILE.json, a JSON list of answers, or --answers open."
            )
        return ()
    try:
        listed = json.loads(config.answer_list.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config.answer_list}: not JSON ({error}).") from None
    if not isinstance(listed, list) or not all(isinstance(answer, str) for answer in listed):
        raise InputError(f"{config.answer_list}: expected is a JSON list of answers.")
    check_answers(listed, source=str(config.answer_list))
    return tuple(listed)


def predict_examples(
    config: EvaluateTaskConfig,
    loaded: LoadedTask,
    folder: Path,
    examples: pa.Table,
    answers: tuple[str, ...],
    on_progress: OnProgress,
) -> list[dict[str, Any]]:
    """Predict all examples (`examples.SCHEMA`), checked to come whole and in order.

    Returns:
        For each its `answer`, the `probability` of it, and whether its pictures decode: `is_shown`.
    """
    device = pick_device(config.device)
    check_actors(config.actors, device, cpus_left=DECODE_CPUS)
    blocks = predicted_blocks(
        examples,
        corpus=config.corpus.absolute(),
        model=folder,
        image_size=loaded.model_config.image_size,
        has_two_pictures=loaded.task == "nlvr2",
        batch_size=config.batch_size,
        actors=config.actors,
        on_gpu=device == "cuda",
        answering=Answering(
            top_k=config.top_k, is_open=config.answers == "open", num_beams=config.num_beams
        ),
        answers=answers,
    )
    rows = []
    for block in blocks:
        columns = {name: block[name].tolist() for name in block}
        values = zip(*columns.values(), strict=True)
        rows += [dict(zip(columns, row, strict=True)) for row in values]
        on_progress("examples", len(rows), len(examples))
    numbers = [row["number"] for row in rows]
    assert numbers == list(range(len(examples))), "every example once, in order"
    return rows


def _score(
    task: str, table: pa.Table, answered: list[str]
) -> tuple[NDArray[np.floating], str, NDArray[np.floating]]:
    """Score the answers, name the most frequent truth, and score always saying that."""
    majority = Counter(truths_of(task, table)).most_common(1)[0][0]
    blind = score_answers(task, table, [majority] * len(table))
    return score_answers(task, table, answered), majority, blind


def _slices_of(kind: str, text: str) -> tuple[str, ...]:
    return (f"{length_name(text)} text", *([kind] if kind else []))


def _log(
    result: TaskResult,
    config: EvaluateTaskConfig,
    tracker: tracking.Tracker,
    *,
    examples: pa.Table,
) -> None:
    folder = f"eval/{tracking.metric_name(config.corpus.resolve().name)}"
    found = result.accuracy
    points = {
        f"{folder}/accuracy": found.value,
        f"{folder}/accuracy_low": found.low,
        f"{folder}/accuracy_high": found.high,
        f"{folder}/accuracy_majority": found.chance,
    }
    tracker.log(points, step=0)
    tracker.log_dict(asdict(result), f"{folder}/{result.task}.json")
    with tempfile.TemporaryDirectory(prefix="albef-evaluate-") as scratch:
        write_config(config, Path(scratch) / "evaluate.json")
        tracker.log_artifact(Path(scratch) / "evaluate.json", f"{folder}/evaluate.json")
    tracker.log_figure(slices_figure(found, result.slices), f"{folder}/slices.png")
    corpus = open_corpus(config.corpus.absolute())
    pictures = [examples[side].to_pylist() for side in ("left", "row")]
    cases = list(zip(result.predictions, *pictures, strict=True))
    cases.sort(key=lambda case: case[0].probability, reverse=True)
    for name, score in (("worst", 0), ("best", 1)):
        shown = [
            Case(
                images=tuple(_shown(corpus, row) for row in rows if row != NO_ROW),
                text=said.text,
                truth=said.truth,
                answer=said.answer,
                probability=said.probability,
            )
            for said, *rows in [case for case in cases if case[0].score == score][:NUM_CASES]
        ]
        if shown:
            tracker.log_figure(cases_figure(name, shown), f"{folder}/{name}.png")


def _shown(corpus: Any, row: int) -> NDArray[np.uint8]:
    return decode_image(corpus.read(row).image)
