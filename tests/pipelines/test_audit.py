import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

import pipelines.audit
from albef_core.api import Albef
from albef_core.errors import InputError
from albef_core.official import from_official
from albef_core.preprocess import decode_image
from albef_core.teacher import Teacher
from albef_core.weights import load_model, official_state
from pipelines.audit import audit
from pipelines.audit_report import Disbelief, audit_table, disbelief_figure
from pipelines.audit_scores import Judged, disbelief
from pipelines.audit_words import NearestCaptions, nearest_captions, unlikeliest_word
from pipelines.config import AuditConfig
from pipelines.config_file import read_config
from pipelines.embedder import load_judge
from pipelines.manifest import content_id, read_columns, read_manifest
from pipelines.pairs import open_corpus
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import encoded_here, save_small_model, words_of

ROOT = Path(__file__).parents[2]
NUM_IMAGES, BROKEN, SILENT = 20, 3, 5
WRONG = (2, 3, 7, 11, 12, 19)
"""Pictures whose captions are another's; one of them does not decode."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rows = [picture_row(number) for number in range(NUM_IMAGES)]
    for number, row in enumerate(rows):
        row["annotations"] = json.dumps({"caption_is_wrong": number in WRONG})
    rows[BROKEN]["image"] = rows[BROKEN]["image"][:200]
    rows[SILENT]["captions"] = ["?!", "a green picture"]
    folder = tmp_path_factory.mktemp("data") / "noisy corpus"
    write_corpus(folder, rows, rows_per_shard=12, rows_per_group=8)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus):
    """A checkpoint: the teacher is another random model than the student."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    student = save_small_model(folder, words_of(read_manifest(corpus)))
    other = save_small_model(folder.with_name("other"), words_of(read_manifest(corpus)), seed=1)
    teacher = Teacher(load_model(folder).model_config, other)
    moving = official_state(teacher, text_layers=1, prefix="teacher.")
    save_file(moving | {"queues.image.pointer": torch.tensor(0)}, folder / "teacher.safetensors")
    assert not student.itm_head.weight.equal(other.itm_head.weight)
    return folder


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture
def config(tmp_path, corpus, model):
    return AuditConfig(
        model=str(model),
        corpus=corpus,
        out=tmp_path / "audit",
        batch_size=3,
        bootstrap=50,
        device="cpu",
    )


@pytest.fixture
def knowing(monkeypatch):
    """Let ITM know which captions are wrong, each to another degree."""

    def tables(manifest, groups, *args):
        row = 0
        for table in encoded_here(manifest, groups, *args):
            odds = []
            for captions in table["captions"].to_pylist():
                sign = -1 if row in WRONG else 1
                odds.append([sign * (50.0 + row + 0.25 * n) for n in range(len(captions))])
                row += 1
            yield table.set_column(4, "match_log_odds", [odds])

    monkeypatch.setattr(pipelines.audit, "embedded_tables", tables)


def scores_of(out):
    return pq.read_table(out / "scores.parquet").to_pylist()


def test_a_model_that_knows_finds_all_wrong_captions(knowing, config):
    result = audit(config)

    judged = [number for number in WRONG if number != BROKEN]
    assert result.num_pairs == 2 * NUM_IMAGES - 3
    assert result.num_wrong == 2 * len(judged)
    assert result.auc["score"].value == result.auc["itm"].value == 1
    assert result.auc["score"].low == result.auc["score"].high == 1
    assert result.auc["score"].chance == 0.5
    assert (result.num_undecodable, result.num_empty_captions) == (1, 1)
    rows = scores_of(config.out)
    worst = {row["image_id"] for row in rows[: 2 * len(judged)]}
    assert worst == {f"picture-{number:03d}" for number in judged}


def test_every_caption_has_its_row_the_worst_first_and_the_unjudged_last(knowing, config):
    audit(config)

    rows = scores_of(config.out)
    captions = [(row["image_id"], number, caption)
                for table in read_columns(read_manifest(config.corpus), ["image_id", "captions"])
                for row in table.to_pylist()
                for number, caption in enumerate(row["captions"])]  # fmt: skip
    found = [(row["image_id"], row["caption_number"], row["caption"]) for row in rows]
    assert sorted(found) == sorted(captions)
    scores = [row["score"] for row in rows[:-3]]
    assert scores == sorted(scores, reverse=True)
    assert found[-3:] == [
        entry for entry in captions if entry[0] == f"picture-{BROKEN:03d}" or entry[2] == "?!"
    ]
    assert all(row[name] is None for row in rows[-3:] for name in ("itc", "itm", "score"))


def test_the_worst_are_dropped_into_a_corpus_that_reads_back(knowing, config):
    # Ten of 37 are wrong; a broken picture's captions are not judged, so they stay.
    result = audit(replace(config, drop_worst=10 / 37))

    cleaned = read_manifest(config.out / "corpus")
    rows = [row for table in read_columns(cleaned, ["image_id", "sha256", "captions",
                                                    "annotations"])
            for row in table.to_pylist()]  # fmt: skip
    kept = [number for number in range(NUM_IMAGES) if number not in WRONG or number == BROKEN]
    assert [row["image_id"] for row in rows] == [f"picture-{number:03d}" for number in kept]
    assert (result.num_dropped, result.num_pictures_dropped) == (10, 5)
    assert (
        result.cleaned_id
        == cleaned.content_id
        == content_id(
            (row["image_id"], row["sha256"], row["captions"], row["annotations"]) for row in rows
        )
    )
    assert cleaned.settings["cleaned_from"] == read_manifest(config.corpus).content_id
    dropped = pq.read_table(config.out / "corpus" / "report" / "dropped.parquet").to_pylist()
    assert dropped == scores_of(config.out)[:10]


def test_the_results_are_in_mlflow(knowing, config):
    result = audit(config)

    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.data.metrics["audit/noisy_corpus/auc"] == 1
    assert run.data.metrics["audit/noisy_corpus/auc_low"] == 1
    assert run.data.metrics["audit/noisy_corpus/itc/auc"] == result.auc["itc"].value
    assert run.info.status == "FINISHED"
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "audit" / "noisy_corpus"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["audit.json", "config.json", "worst.png"]
    assert read_config(config.out / "config.json", AuditConfig) == config
    assert json.loads((config.out / "audit.json").read_text())["run_id"] == result.run_id


def test_a_corpus_that_says_nothing_of_wrong_captions_has_no_area(monkeypatch, config, tmp_path):
    monkeypatch.setattr(pipelines.audit, "embedded_tables", encoded_here)
    rows = [picture_row(number) for number in range(3)]
    write_corpus(tmp_path / "plain", rows, rows_per_shard=4, rows_per_group=4)

    result = audit(replace(config, corpus=tmp_path / "plain"))

    assert result.num_wrong is None
    assert result.auc == {}
    assert not any("AUC" in cell for cell in audit_table(result).columns[0].cells)


def test_the_score_is_the_literal_sum_of_both_parts():
    rng = np.random.default_rng(0)
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True)
                     for x in (rng.normal(size=(3, 4)), rng.normal(size=(5, 4))))  # fmt: skip
    row, log_odds = np.array([0, 0, 1, 2, 2]), np.array([1.0, -2.0, 0.5, 3.0, 9.0])
    judged = Judged(
        image_ids=["a", "b", "c"],
        image_features=images.astype(np.float32),
        is_decoded=np.array([True, True, True]),
        captions=list("pqrst"),
        text_features=texts.astype(np.float32),
        has_words=np.array([True, True, True, True, False]),
        row=row,
        number=np.array([0, 1, 0, 0, 1]),
        log_odds=log_odds.astype(np.float32),
    )

    scores = disbelief(judged, 0.1, seed=0)

    for text in range(4):
        mine = np.exp(images[row[text]] @ texts[text] / 0.1)
        other_texts = [np.exp(images[row[text]] @ texts[other] / 0.1) for other in range(4)]
        other_images = [np.exp(image @ texts[text] / 0.1) for image in images]
        parts = np.log(mine / np.mean(other_texts)), np.log(mine / np.mean(other_images))
        expected = -(np.mean(parts) + log_odds[text])
        np.testing.assert_allclose(scores.score[text], expected, rtol=1e-5)
        np.testing.assert_allclose(scores.itc[text], images[row[text]] @ texts[text], rtol=1e-5)
        np.testing.assert_allclose(scores.itm[text], 1 / (1 + np.exp(-log_odds[text])), rtol=1e-5)


def test_a_checkpoint_is_judged_by_its_teacher_with_the_student_s_matching_head(model):
    loaded, is_teacher = load_judge(model)

    assert is_teacher
    student, own = load_model(model).model, dict(loaded.model.named_parameters())
    saved = {k: v for k, v in load_file(model / "teacher.safetensors").items() if "queue" not in k}
    for name, tensor in from_official(saved).items():
        assert own[name.removeprefix("teacher.")].equal(tensor), name
    assert own["itm_head.weight"].equal(student.itm_head.weight)
    assert not own["image_projection.weight"].equal(student.image_projection.weight)


def test_a_model_folder_is_judged_by_the_model(model):
    _, is_teacher = load_judge(model.with_name("other"))

    assert not is_teacher


def test_the_unlikeliest_word_is_the_one_that_fill_mask_doubts_most(model, corpus):
    loaded, _ = load_judge(model)
    albef = Albef(loaded)
    row = open_corpus(corpus).read(0)
    image = decode_image(row.image)
    words = [word for word in ("a", "red", "blue", "square", "picture")
             if word in loaded.tokenizer.words(range(loaded.tokenizer.vocab_size))]  # fmt: skip
    assert len(words) > 2

    found = unlikeliest_word(loaded, image, " ".join(words).upper() + "!")

    assert found is not None
    doubts = {}
    for place, word in enumerate(words):
        text = " ".join([*words[:place], "[MASK]", *words[place + 1 :]])
        ((guess,),) = albef.fill_mask([image], [text], top_k=loaded.tokenizer.vocab_size)
        shares = dict(zip(guess.words, guess.probabilities, strict=True))
        doubts[word] = (guess.probabilities[0] / shares[word], text, guess)
    doubt, text, guess = doubts[found.true_word]
    assert doubt == max(value for value, *_ in doubts.values())
    assert found.masked_caption == text
    assert tuple(found.words) == guess.words[:5]
    np.testing.assert_allclose(found.probabilities, guess.probabilities[:5], rtol=1e-4)


def test_a_caption_without_a_word_of_one_piece_has_none(model):
    loaded, _ = load_judge(model)

    assert unlikeliest_word(loaded, np.zeros((9, 9, 3), np.uint8), "zzzz qqqq") is None


def test_the_same_caption_of_two_pictures_is_near_once():
    near = nearest_captions(np.array([0.1, 0.9, 0.5, 0.9], np.float32), ["a", "b", "c", "b"])

    assert near.captions == ["b", "c", "a"]
    assert near.similarities == pytest.approx([0.9, 0.5, 0.1])


def test_the_page_says_how_many_are_known_to_be_wrong():
    row = Disbelief(
        image=np.zeros((9, 9, 3), np.uint8),
        caption="a red square",
        itc=0.1,
        itm=0.2,
        score=3.0,
        is_wrong=True,
        nearest=NearestCaptions(captions=["a blue circle"], similarities=[0.8]),
        word=None,
    )

    figure = disbelief_figure([row, replace(row, is_wrong=False)], num_pairs=1000)

    assert figure.get_suptitle() == (
        "Of 1,000 captions the model believes these the least: 1 of 2 are known to be wrong"
    )


def test_a_corpus_of_annotations_alone_is_refused(config, tmp_path):
    row = picture_row(0) | {"captions": [], "annotations": "{}"}
    write_corpus(tmp_path / "silent", [row], rows_per_shard=4, rows_per_group=4)

    with pytest.raises(InputError, match="has no captions, only annotations"):
        audit(replace(config, corpus=tmp_path / "silent"))


def test_a_corpus_of_nothing_to_judge_is_refused(monkeypatch, config, tmp_path):
    monkeypatch.setattr(pipelines.audit, "embedded_tables", encoded_here)
    row = picture_row(0) | {"captions": ["?!"]}
    write_corpus(tmp_path / "empty", [row], rows_per_shard=4, rows_per_group=4)

    with pytest.raises(InputError, match="none of its 1 pictures decodes and has a caption"):
        audit(replace(config, corpus=tmp_path / "empty"))


def test_a_second_audit_in_the_same_folder_is_refused(knowing, config):
    audit(config)

    with pytest.raises(InputError, match="holds an audit already"):
        audit(config)


def test_a_model_of_another_task_is_refused(config, tmp_path, model):
    folder = tmp_path / "vqa"
    folder.mkdir()
    saved = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"task": "vqa"}))

    with pytest.raises(InputError, match="fine-tuned for vqa, which cannot do this"):
        audit(replace(config, model=str(folder)))


@pytest.mark.slow
@pytest.mark.cluster
def test_the_job_audits_through_ray_and_prints_the_area(joined_ray, config):
    command = [sys.executable, "jobs/audit.py", "--model", config.model, "--corpus", config.corpus,
               "--out", config.out, "--batch-size", "4", "--bootstrap", "20"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)

    assert done.returncode == 0, done.stderr
    found = json.loads((config.out / "audit.json").read_text())
    assert found["judged_by"] == "teacher"
    assert f"{found['auc']['score']['value']:.4f}" in done.stdout
    albef = Albef(load_judge(Path(config.model))[0])
    row = scores_of(config.out)[0]
    image = config.out / "picture.jpg"
    number = int(row["image_id"].removeprefix("picture-"))
    image.write_bytes(open_corpus(config.corpus).read(number).image)
    assert row["itm"] == pytest.approx(albef.match([image], [row["caption"]])[0], abs=1e-5)
    cosine = albef.embed_images([image]) @ albef.embed_texts([row["caption"]]).T
    assert row["itc"] == pytest.approx(cosine.item(), abs=1e-5)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "holds an audit already" in again.stderr
