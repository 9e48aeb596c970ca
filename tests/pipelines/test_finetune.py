"""Fine-tuning each task from a pre-trained model's folder, and what it leaves."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from albef_core.api import Albef
from albef_core.config import OptimConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tasks.folder import load_task
from albef_core.tasks.predict import Answering, predict
from albef_core.tokenizer import Tokenizer
from albef_core.weights import is_fine_tuned, load_model, save_model
from pipelines.answer_file import write_answers
from pipelines.assignment_task import AssignmentTask
from pipelines.config import FinetuneConfig
from pipelines.evaluate_task import evaluate_task
from pipelines.evaluation_config import EvaluateTaskConfig
from pipelines.example_task import ExampleTask, weigh_answers
from pipelines.examples import collect_examples
from pipelines.finetune import ON_PAIRS, finetune, prepare_task
from pipelines.manifest import Manifest, read_captions
from pipelines.pair_task import PairTask
from pipelines.presets import FINETUNE, tiny
from pipelines.shapes import shapes_picture
from pipelines.task import Task
from tests.conftest import picture_row, write_corpus

NUM_IMAGES, BATCH = 60, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Generated pictures with questions, statements, pairs and expressions."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "corpus", range(NUM_IMAGES))


def write_shapes(folder: Path, numbers: range) -> Manifest:
    pictures = {number: shapes_picture(0, number) for number in numbers}
    rows = [
        picture_row(number)
        | {
            "image": picture.encoded,
            "image_id": picture.image_id,
            "captions": picture.captions,
            "annotations": picture.annotations,
        }
        for number, picture in pictures.items()
    ]
    return write_corpus(folder, rows, rows_per_shard=60, rows_per_group=16)


@pytest.fixture(scope="module")
def pretrained(corpus: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights, one layer of each kind."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    words = Tokenizer.learn([text for row in read_captions(corpus) for text in row], vocab_size=300)
    sizes = dataclasses.replace(
        tiny().model,
        image_size=32,
        image_width=32,
        image_layers=1,
        text_width=32,
        text_layers=1,
        fusion_layers=1,
        vocab_size=words.vocab_size,
    )
    torch.manual_seed(7)
    save_model(
        folder,
        ALBEF(sizes),
        model_config=sizes,
        text_config=TextConfig(tokenizer="corpus", max_tokens=20),
        recipe=Recipe(),
        tokenizer=words,
    )
    return folder


def run_of(task: str, corpus: Manifest, pretrained: Path, root: Path) -> FinetuneConfig:
    return dataclasses.replace(
        FINETUNE[task](),
        corpus=corpus.folder,
        init=str(pretrained),
        storage=root / "runs",
        name="run",
        steps=4,
        epochs=None,
        batch_size=BATCH,
        workers=2,
        log_every=2,
        num_slots=16,
        optim=OptimConfig(lr=1e-2, warmup_steps=0, clip_norm=1.0),
    )


@pytest.mark.parametrize("task", FINETUNE)
def test_a_task_starts_from_the_pretrained_weights_learns_and_is_kept(
    task: str, corpus: Manifest, pretrained: Path, tmp_path: Path
) -> None:
    config = run_of(task, corpus, pretrained, tmp_path)
    collected = None if task == "text-assignment" else collect_examples(corpus, config.task)
    _, tags = prepare_task(config, collected, tmp_path / "start")
    kinds: dict[str, Any] = {"text-assignment": AssignmentTask} | dict.fromkeys(ON_PAIRS, PairTask)
    made: Task = kinds.get(task, ExampleTask)(config, tmp_path / "start", CPU)
    theirs = load_model(pretrained).model.state_dict()
    own = made.student.state_dict()
    block = "image_encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(own[block], theirs[block])
    patches = 2 * 2 if task == "text-assignment" else 3 * 3  # of 16 pixels: 32, or 1.5 times that
    assert own["image_encoder.pos_embed"].shape[1] == 1 + patches
    assert "0 missing" in tags["weights"] or "classifier" in tags["weights"] or task not in ON_PAIRS

    optimizer = torch.optim.AdamW(made.student.parameters(), lr=2e-3)
    losses = []
    columns = made.spec.prepare(step=0, start=0, stop=BATCH)
    batch = made.spec.collect(0, 0, columns)
    assert len(batch.captions) == BATCH
    for _ in range(14):
        outcome = made.forward(batch, longest=made.longest(batch), alpha=0.4, seed=0)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        losses.append(made.curves(outcome)["train/loss/total"].item())
    assert losses[-1] < losses[0]
    if made.teacher is not None:
        assert moved(made.teacher, theirs), "the teacher follows"
    made.save(tmp_path / "model", made.student)
    assert is_fine_tuned(tmp_path / "model")
    assert not is_fine_tuned(pretrained)
    loaded = load_model(tmp_path / "model") if task in ON_PAIRS else load_task(tmp_path / "model")
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, dict(made.student.named_parameters())[name]), name
    if task in ON_PAIRS:
        with pytest.raises(InputError, match=r"no MLM head.*load a pre-trained model"):
            Albef.load(tmp_path / "model").fill_mask([np.zeros((9, 9, 3), np.uint8)], ["[MASK]"])


def test_nlvr2_starts_from_text_assignment_and_nothing_else_does(
    corpus: Manifest, pretrained: Path, tmp_path: Path
) -> None:
    prepare_task(run_of("text-assignment", corpus, pretrained, tmp_path), None, tmp_path / "first")
    assigned = load_task(init := tmp_path / "first")
    config = run_of("nlvr2", corpus, init, tmp_path)
    _, tags = prepare_task(config, collect_examples(corpus, "nlvr2"), tmp_path / "second")
    own, theirs = load_task(tmp_path / "second").model.state_dict(), assigned.model.state_dict()
    for name, weight in own.items():
        is_new = name.startswith("classifier.") or name == "image_encoder.pos_embed"
        assert is_new or torch.equal(weight, theirs[name]), name
    assert "4 missing" in tags["weights"], "the classifier alone"
    config = run_of("entailment", corpus, init, tmp_path)
    with pytest.raises(InputError, match="fine-tuned for text-assignment, which cannot do this"):
        prepare_task(config, collect_examples(corpus, "entailment"), tmp_path / "third")


def moved(teacher: nn.Module, theirs: dict[str, torch.Tensor]) -> bool:
    name = "image_encoder.blocks.0.attn.qkv.weight"
    return not torch.equal(dict(teacher.named_parameters())[name], theirs[name])


def test_examples_are_those_of_the_annotations_and_every_one_is_shown_once_an_epoch(
    corpus: Manifest, pretrained: Path, tmp_path: Path
) -> None:
    config = run_of("vqa", corpus, pretrained, tmp_path)
    collected = collect_examples(corpus, "vqa")
    truth = [
        question["question"]
        for number in range(NUM_IMAGES)
        for question in json.loads(shapes_picture(0, number).annotations)["questions"]
    ]
    assert collected.table["text"].to_pylist() == truth
    prepare_task(config, collected, tmp_path / "start")
    spec = ExampleTask(config, tmp_path / "start", CPU).spec
    steps = spec.count() // BATCH
    seen = [
        text
        for step in range(steps)
        for text in spec.prepare(step=step, start=0, stop=BATCH)["captions"]
    ]
    left_over = spec.count() % BATCH
    assert len(seen) == len(truth) - left_over
    assert sorted(seen) != seen
    again = spec.prepare(step=1, start=3, stop=7)
    assert again["captions"].tolist() == seen[BATCH + 3 : BATCH + 7]


def test_answers_weigh_what_their_share_of_annotators_is() -> None:
    given = [["red", "blue", "red", "red"], ["two"], ["cat"]]
    texts, weights, counts = weigh_answers(given, [1.0, 1.0, 0.5])
    assert texts == ["red", "blue", "two", "cat"]
    assert weights == [0.75, 0.25, 1.0, 0.5]
    assert counts == [2, 1, 1]


def corpus_of_questions(folder: Path, *questions: dict) -> Manifest:
    """One picture with questions."""
    said = {"annotations": json.dumps({"questions": list(questions)})}
    return write_corpus(folder, [picture_row(0) | said], rows_per_shard=1, rows_per_group=1)


def test_one_annotator_of_visual_genome_weighs_half_as_published(tmp_path: Path) -> None:
    asked = {"question": "who?", "answers": ["anna"]}
    manifest = corpus_of_questions(tmp_path, asked, asked | {"dataset": "vg"})
    assert collect_examples(manifest, "vqa").table["weight"].to_pylist() == [1.0, 0.5]


def test_questions_without_answers_are_counted_or_refused(tmp_path: Path) -> None:
    asked = {"question": "who?", "answers": [], "id": 7}
    both = corpus_of_questions(tmp_path / "both", asked, asked | {"answers": ["anna"], "id": "8"})
    collected = collect_examples(both, "vqa")
    assert collected.table["id"].to_pylist() == ['"8"']
    assert collected.bad == {"no answer": 1}
    alone = corpus_of_questions(tmp_path / "alone", asked)
    with pytest.raises(InputError, match=r"nothing to learn or to score.*--predictions OUT\.json"):
        collect_examples(alone, "vqa")


def test_random_weights_are_taken_only_when_asked_for(
    corpus: Manifest, pretrained: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        run_of("entailment", corpus, pretrained, tmp_path), from_scratch=True
    )
    _, tags = prepare_task(config, collect_examples(corpus, "entailment"), tmp_path / "start")
    assert tags["weights"].startswith("random start, as asked for: 0 matched")
    block = "image_encoder.blocks.0.attn.qkv.weight"
    weights = load_task(tmp_path / "start").model.state_dict()
    assert not torch.equal(weights[block], load_model(pretrained).model.state_dict()[block])


def test_mistakes_are_one_line_each(corpus: Manifest, pretrained: Path, tmp_path: Path) -> None:
    config = run_of("vqa", corpus, pretrained, tmp_path)
    collected = collect_examples(corpus, "vqa")
    with pytest.raises(InputError, match="--init is missing"):
        finetune(dataclasses.replace(config, init=FINETUNE["vqa"]().init))
    with pytest.raises(InputError, match=r"--max-tokens 500 is more than the 64 positions"):
        prepare_task(dataclasses.replace(config, max_tokens=500), collected, tmp_path / "a")
    missing = dataclasses.replace(config, init=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"--init .*nothing: no such file"):
        prepare_task(missing, collected, tmp_path / "b")
    bare = write_corpus(
        tmp_path / "bare",
        [picture_row(0)],
        rows_per_shard=1,
        rows_per_group=1,
    )
    with pytest.raises(InputError, match="none of its 1 pictures has annotations for vqa"):
        collect_examples(bare, "vqa")
    prepare_task(config, collected, tmp_path / "start")
    with pytest.raises(InputError, match="fine-tuned for vqa"):
        load_model(tmp_path / "start")
    with pytest.raises(InputError, match="not fine-tuned for any of"):
        load_task(pretrained)


def test_open_answers_are_written_and_closed_ones_chosen(
    corpus: Manifest, pretrained: Path, tmp_path: Path
) -> None:
    prepare_task(
        run_of("vqa", corpus, pretrained, tmp_path),
        collect_examples(corpus, "vqa"),
        tmp_path / "start",
    )
    loaded = load_task(tmp_path / "start")
    loaded.model.eval()
    pictures = torch.randint(0, 255, (3, 48, 48, 3), dtype=torch.uint8)
    questions = ["what color is it?", "how many?", "is there a star?"]
    chosen = predict(loaded, pictures, questions, answering=Answering(top_k=5))
    assert set(chosen.answers) <= set(loaded.answers)
    assert chosen.probabilities.shape == (3, 5)
    np.testing.assert_allclose(chosen.probabilities.sum(axis=1), 1, rtol=1e-5)
    written = predict(loaded, pictures, questions, answering=Answering(is_open=True, num_beams=2))
    assert all(isinstance(answer, str) for answer in written.answers)


@pytest.mark.cluster
@pytest.mark.slow
def test_questions_go_through_training_evaluation_and_mlflow(
    local_ray: None,
    corpus: Manifest,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    held_out = write_shapes(tmp_path / "held-out", range(NUM_IMAGES, NUM_IMAGES + 11))
    config = run_of("vqa", corpus, pretrained, tmp_path)
    config = dataclasses.replace(config, val=held_out.folder, val_at=(BATCH + 1,))
    result = finetune(config)
    evaluated = evaluate_task(
        "vqa",
        EvaluateTaskConfig(
            model=result.stored.uri,
            corpus=held_out.folder,
            json=tmp_path / "vqa.json",
            batch_size=50,
            bootstrap=50,
        ),
    )
    saved = json.loads((tmp_path / "vqa.json").read_text())
    total = len(collect_examples(held_out, "vqa").table)
    assert saved["num_examples"] == len(saved["predictions"]) == total
    scores = [prediction["score"] for prediction in saved["predictions"]]
    assert saved["accuracy"]["value"] == pytest.approx(sum(scores) / total)
    assert evaluated.accuracy.low <= evaluated.accuracy.value <= evaluated.accuracy.high
    assert evaluated.run_id == result.handle.run_id
    # Two workers had a share each of what one actor has answered whole.
    client = MlflowClient(result.handle.uri)
    first, last = client.get_metric_history(result.handle.run_id, "val/accuracy")
    assert first.step == 2, "of the step that sees the pair which --val-at names"
    assert last.step == 4
    # The model that is kept is the one that did better on held-out pictures.
    assert max(first.value, last.value) == pytest.approx(evaluated.accuracy.value)
    served = mlflow.pyfunc.load_model(result.stored.uri)
    picture = shapes_picture(0, 0).encoded
    answer = served.predict(pd.DataFrame({"image": [picture], "text": ["what color is it?"]}))
    assert 0 <= answer["probability"][0] <= 1
    asked = {"question": "what color is it?", "answers": []}
    unscored = corpus_of_questions(tmp_path / "test", asked | {"id": 7}, asked | {"id": 9})
    config = EvaluateTaskConfig(
        model=str(result.model), corpus=unscored.folder, predictions=tmp_path / "out" / "said.json"
    )
    assert write_answers(config, on_progress=lambda *_: None).num_questions == 2
    said = json.loads((tmp_path / "out" / "said.json").read_text())
    assert [one["question_id"] for one in said] == [7, 9]
    assert {one["answer"] for one in said} <= set(load_task(result.model).answers)
    with pytest.raises(InputError, match="1 of its 1 questions have no id"):
        write_answers(
            dataclasses.replace(config, corpus=corpus_of_questions(tmp_path / "no", asked).folder),
            on_progress=lambda *_: None,
        )
    with pytest.raises(InputError, match="fine-tuned for vqa, not for entailment"):
        evaluate_task(
            "entailment", EvaluateTaskConfig(model=str(result.model), corpus=corpus.folder)
        )
