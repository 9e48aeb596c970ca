"""What the tasks after pre-training learn from: one example for each annotation of a corpus.

A question, a statement about one picture or about two. The table of all examples is written once,
in the order of the corpus's rows; every task of the feed maps it into memory. Imports no torch.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from albef_core.captions import clean_caption, clean_question
from albef_core.config import TextConfig
from albef_core.errors import InputError
from albef_core.preprocess import UndecodableImage, augment, decode_image
from albef_core.tasks.labels import LABELS
from albef_core.tokenizer import Tokenizer
from pipelines.config import AugmentConfig, TaskName
from pipelines.manifest import Manifest, read_columns
from pipelines.order import Stream, epoch_slice, generator, steps_per_epoch
from pipelines.pairs import MAX_STAND_INS, image_key, open_corpus

PLACES = {
    "retrieval": ("captions", ""),
    "grounding": ("objects", "expression"),
    "entailment": ("entailment", "sentence"),
    "vqa": ("questions", "question"),
    "nlvr2": ("pairs", "sentence"),
}
"""Where the examples of a task are: key of the annotations, and of a text there."""
NO_ROW = -1
EXAMPLES_FILE = "examples.arrow"
"""In the folder that a training starts from: what it learns."""
VAL_FILE = "val.arrow"
"""Beside it: what is asked of the held-out pictures."""
NO_ANSWER = "no answer"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("left", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("label", pa.string()),
        pa.field("answers", pa.list_(pa.string())),
        pa.field("kind", pa.string()),
        pa.field("weight", pa.float32()),
        pa.field("id", pa.string()),
    ]
)
"""`row`: of the picture, or of the right one; `left`: of the left one, else -1; `label`: the class,
else ""; `answers`: one an annotator; `kind`: what results are told apart by; `weight`: what the
answers of a question weigh together; `id`: a question's, as JSON, else ""."""
ANSWERS_WEIGH = {"vg": 0.5}
"""By data set, where it is not 1: `dataset/vqa_dataset.py` of the published code trusts the one
annotator of Visual Genome half as much as the ten of VQA."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The examples that a corpus has for a task, and what of its annotations cannot be used."""

    table: pa.Table
    bad: dict[str, int] = field(default_factory=dict)
    """By class, how many annotations were left out."""


def collect_examples(
    manifest: Manifest, task: TaskName, *, with_unanswered: bool = False
) -> Collected:
    """Find all examples of a task in a corpus's annotations, in the order of its rows.

    Questions without answers can neither be learned nor scored: only `with_unanswered` takes them.

    Raises:
        InputError: there is none.
    """
    rows_of: dict[str, int] = {}
    if task == "nlvr2":
        for table in read_columns(manifest, ["image_id"]):
            rows_of |= {name: len(rows_of) + n for n, name in enumerate(table[0].to_pylist())}
    bad: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    row = 0
    for table in read_columns(manifest, ["annotations", "captions"]):
        for text, captions in zip(*(column.to_pylist() for column in table.columns), strict=True):
            said = json.loads(text or "{}") | {"captions": captions}
            for example in _examples_of(said, task, rows_of, bad, with_unanswered):
                for name, value in ({"row": row} | example).items():
                    columns[name].append(value)
            row += 1
    if not columns["row"] and bad.keys() == {NO_ANSWER}:
        raise InputError(
            f"{manifest.folder}: none of its {bad[NO_ANSWER]} questions has an answer, so there is"
            " nothing to learn or to score. jobs/evaluate.py vqa --predictions OUT.json answers"
            " them in a file for the VQA server."
        )
    if not columns["row"]:
        raise InputError(
            f"{manifest.folder}: none of its {row} pictures has annotations for {task}"
            f"{_said(bad)}. Ingest a data set of that task."
        )
    return Collected(table=pa.table(columns, schema=SCHEMA), bad=dict(bad))


def _said(bad: Counter[str]) -> str:
    return "".join(f", {count} with {kind}" for kind, count in bad.items())


def _examples_of(
    annotations: dict[str, Any],
    task: TaskName,
    rows_of: dict[str, int],
    bad: Counter[str],
    with_unanswered: bool,
) -> Iterator[dict[str, Any]]:
    """Read the annotations of one picture."""
    key, part = PLACES[task]
    for entry in annotations.get(key) or []:
        text = entry if task == "retrieval" else entry.get(part) or ""
        example = dict.fromkeys(SCHEMA.names[1:], "") | {"left": NO_ROW, "text": text}
        example |= {"answers": [], "weight": 1.0}
        if task == "grounding" and part not in entry:
            continue  # a thing without an expression is no example, and no mistake
        if not text.strip():
            bad["no text"] += 1
            continue
        if task == "vqa":
            answers = [answer for answer in entry.get("answers") or [] if answer.strip()]
            if not answers and not with_unanswered:
                bad[NO_ANSWER] += 1
                continue
            yield example | {
                "answers": answers,
                "kind": entry.get("answer_type") or entry.get("type") or "",
                "weight": ANSWERS_WEIGH.get(entry.get("dataset"), 1.0),
                "id": json.dumps(entry["id"]) if "id" in entry else "",
            }
            continue
        if task in ("retrieval", "grounding"):
            yield example
            continue
        label = str(entry.get("label")).lower()
        if label not in LABELS[task]:
            bad["an unknown label"] += 1
            continue
        example |= {"label": label, "kind": label}
        if task == "nlvr2":
            left = rows_of.get(entry.get("left", ""), NO_ROW)
            if left == NO_ROW:
                bad["a missing left picture"] += 1
                continue
            example |= {"left": left}
        yield example


def write_examples(collected: Collected, path: Path) -> None:
    """Write the table as an Arrow file, by rename; `ExampleSpec` maps it into memory."""
    partial = path.with_suffix(".tmp")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(collected.table)
    partial.replace(path)


@lru_cache(maxsize=4)
def open_examples(path: Path) -> pa.Table:
    """Map what `write_examples` wrote into memory, once a process."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()


@dataclass(frozen=True, kw_only=True)
class ExampleBatch:
    """One worker's share of one global step; the arrays may be read-only views of shared memory."""

    step: int
    """Global step, from 0 over all epochs."""
    epoch: int
    images: NDArray[np.uint8]
    """Augmented pictures (B, S, S, 3), or pairs of them, left and right (B, 2, S, S, 3)."""
    token_ids: NDArray[np.int32]
    """Texts (B, L), padded to the longest that may be."""
    labels: list[str]
    """Classes, "" where the task has none."""
    answers: list[list[str]]
    """Answers of all annotators, one list a question."""
    weights: NDArray[np.float32]
    """What each question's answers weigh together (B)."""
    image_ids: list[str]
    image_keys: NDArray[np.int64]
    """`pairs.image_key` of every (right) picture (B)."""
    captions: list[str]
    """The texts as they are in the corpus."""
    bad_ids: list[str]
    """Images that were due and would not decode; the next example stands in for each."""


@dataclass(frozen=True, kw_only=True)
class ExampleSpec:
    """All that a task of the feed needs to make any example of the run."""

    corpus: Path
    """Corpus folder, absolute."""
    examples: Path
    """File of `write_examples`, absolute."""
    is_question: bool
    """Texts are questions, which are cleaned a little differently."""
    has_two_pictures: bool
    tokenizer: str
    """Folder written by `Tokenizer.save`, absolute."""
    text: TextConfig
    augment: AugmentConfig
    image_size: int
    """Height and width of the finished pictures in pixels."""
    keep_sep: bool
    """Texts end in [SEP]."""
    saturate_pixels: bool
    """RandAugment stops at 0 and 255 instead of overflowing."""
    seed: int
    """Seed of the run."""
    batch_size: int
    """Examples in a global batch, over all workers."""
    rows_per_block: int = 128
    """Most examples that one task prepares."""

    def count(self) -> int:
        """Count the examples of an epoch."""
        return len(open_examples(self.examples))

    def prepare(self, *, step: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Make examples start to stop of the global batch of one step.

        An example whose picture does not decode is replaced by the next one in the epoch's order.

        Raises:
            InputError: `MAX_STAND_INS` examples in a row cannot be shown.
        """
        epoch, step_of_epoch = divmod(step, steps_per_epoch(self.count(), self.batch_size))
        first = step_of_epoch * self.batch_size
        order = _order(self, epoch=epoch, start=first + start, stop=first + stop)
        table = open_examples(self.examples)
        shown = [
            _show(self, table, order[index : index + MAX_STAND_INS], epoch=epoch)
            for index in range(stop - start)
        ]
        numbers, images, ids, bad_ids = zip(*shown, strict=True)
        rows = table.take(np.array(numbers))
        texts = rows["text"].to_pylist()
        answers = np.empty(len(texts), dtype=object)
        answers[:] = [json.dumps(given) for given in rows["answers"].to_pylist()]
        return {
            "step": np.full(stop - start, step),
            "position": np.arange(start, stop),
            "images": np.stack(images),
            "token_ids": tokenize(self, texts),
            "labels": np.array(rows["label"].to_pylist(), dtype=object),
            "answers": answers,
            "weights": rows["weight"].to_numpy(),
            "image_ids": np.array(ids, dtype=object),
            "captions": np.array(texts, dtype=object),
            "bad_ids": np.array(bad_ids, dtype=object),
        }

    def collect(self, step: int, epoch: int, columns: dict[str, NDArray[Any]]) -> ExampleBatch:
        """Make a worker's batch of the columns of its examples."""
        return ExampleBatch(
            step=step,
            epoch=epoch,
            images=columns["images"],
            token_ids=columns["token_ids"],
            labels=list(columns["labels"]),
            answers=[json.loads(text) for text in columns["answers"]],
            weights=columns["weights"],
            image_ids=list(columns["image_ids"]),
            image_keys=np.array([image_key(image_id) for image_id in columns["image_ids"]]),
            captions=list(columns["captions"]),
            bad_ids=[image_id for image_id in columns["bad_ids"] if image_id],
        )


def tokenize(spec: ExampleSpec, texts: Sequence[str]) -> NDArray[np.int32]:
    """Clean and tokenize texts, padded to `max_tokens`."""
    clean = clean_question if spec.is_question else clean_caption
    return _tokenizer(spec.tokenizer).encode(
        [clean(text, max_words=spec.text.max_words) for text in texts],
        max_tokens=spec.text.max_tokens,
        keep_sep=spec.keep_sep,
        pad_to_max=True,
    )


def _order(spec: ExampleSpec, *, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
    """Number the examples at some positions and at `MAX_STAND_INS` after them, round the end."""
    counts, total = _group_counts(spec.corpus, spec.examples), spec.count()
    reach = min(stop + MAX_STAND_INS, total)
    numbers = epoch_slice(counts, start=start, stop=reach, seed=spec.seed, epoch=epoch)
    beyond = min(stop + MAX_STAND_INS - total, start)
    if beyond <= 0:
        return numbers
    more = epoch_slice(counts, start=0, stop=beyond, seed=spec.seed, epoch=epoch)
    return np.concatenate([numbers, more])


@lru_cache(maxsize=4)
def _group_counts(corpus: Path, examples: Path) -> NDArray[np.int64]:
    """Count the examples of each row group that has any: what is read together stays together."""
    rows = open_examples(examples)["row"].to_numpy()
    groups = np.searchsorted(open_corpus(corpus).group_stops, rows, side="right")
    counts = np.bincount(groups)
    return counts[counts > 0]


def _show(
    spec: ExampleSpec, table: pa.Table, candidates: NDArray[np.int64], *, epoch: int
) -> tuple[int, NDArray[np.uint8], str, str]:
    """Make the pictures of the first example that can be shown.

    Returns:
        Its number, its pictures, the id of the (right) one, and the id of a picture that was due
        and does not decode, else "".
    """
    bad_id = ""
    for number in map(int, candidates):
        sources = [table["left"][number].as_py()] if spec.has_two_pictures else []
        sources.append(table["row"][number].as_py())
        pictures, image_id = [], ""
        for place, row in enumerate(sources):
            source = open_corpus(spec.corpus).read(row)
            image_id = source.image_id
            key = image_key(f"{candidates[0]} {place}")
            rng = generator(Stream.PAIR, seed=spec.seed, epoch=epoch, item=key)
            try:
                pictures.append(_augmented(spec, decode_image(source.image), rng))
            except UndecodableImage:
                bad_id = bad_id or source.image_id
                break
        else:
            images = np.stack(pictures) if spec.has_two_pictures else pictures[0]
            return number, images, image_id, bad_id
    raise InputError(
        f"{spec.corpus}: {len(candidates)} examples in a row have pictures that do not decode,"
        f" {bad_id!r} first. The corpus is damaged: copy it again, or ingest its source once more."
    )


def _augmented(
    spec: ExampleSpec, pixels: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.uint8]:
    return augment(
        pixels,
        size=spec.image_size,
        crop_scale_min=spec.augment.crop_scale_min,
        flip=spec.augment.flip,
        rand_ops=spec.augment.rand_ops,
        rand_level=spec.augment.rand_level,
        rng=rng,
        saturate=spec.saturate_pixels,
    )


@lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
