import json
import shutil
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from albef_core.batch import normalize
from albef_core.captions import clean_caption
from albef_core.errors import InputError
from albef_core.metrics import retrieval_metrics
from albef_core.preprocess import decode_image, resize_square
from albef_core.tasks.retrieval import EncodedImages, encode_texts, itc_similarity, rerank
from albef_core.weights import load_model, read_folder_config
from pipelines.config_file import read_config
from pipelines.evaluate import evaluate_retrieval, protocol_of, resolution_of
from pipelines.evaluation_config import EvaluateConfig
from pipelines.manifest import read_columns, read_manifest
from pipelines.report import summary_table
from pipelines.row_scores import read_rows, subject_of
from pipelines.tracking import RunHandle, open_run
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import save_small_model, words_of

pytestmark = pytest.mark.cluster
NUM_IMAGES, BROKEN, SILENT, TOP_K = 40, 17, 5, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty pictures in three row groups; one is cut short, one has only empty captions."""
    rows = [picture_row(number) for number in range(NUM_IMAGES)]
    rows[BROKEN]["image"] = rows[BROKEN]["image"][:200]
    rows[SILENT]["captions"] = ["...", "!?"]
    rows[0]["captions"] = [*rows[0]["captions"], "..."]
    folder = tmp_path_factory.mktemp("data") / "held out"
    write_corpus(folder, rows, rows_per_shard=40, rows_per_group=16)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_small_model(folder, words_of(read_manifest(corpus)))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus, model_folder):
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
        yield EvaluateConfig(
            model=str(model_folder),
            corpus=corpus,
            json=store / "out" / "result.json",
            top_k=TOP_K,
            sweep_k=True,
            batch_size=7,
            bootstrap=50,
            device="cpu",
        )


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def result(local_ray, config, heard):
    return evaluate_retrieval(config, on_progress=lambda *news: heard.append(news))


def by_hand(corpus, model_folder):
    """The same evaluation in one process, without Ray."""
    loaded = load_model(model_folder)
    model = loaded.model.eval()
    tables = read_columns(read_manifest(corpus), ["image", "captions"])
    rows = [row for table in tables for row in table.to_pylist()]
    rows = [row for number, row in enumerate(rows) if number not in (BROKEN, SILENT)]
    pictures = np.stack([resize_square(decode_image(row["image"]), 16) for row in rows])
    with torch.inference_mode():
        tokens, features = model.encode_image(normalize(torch.from_numpy(pictures)))
    images = EncodedImages(tokens=tokens, features=features)
    cleaned = [[clean_caption(c, max_words=30) for c in row["captions"]] for row in rows]
    texts = [[text for text in own if text] for own in cleaned]
    ids = torch.from_numpy(
        loaded.tokenizer.encode([t for own in texts for t in own], max_tokens=25, keep_sep=True)
    )
    encoded = encode_texts(model, ids, ids != loaded.tokenizer.pad_id, batch_size=100)
    similarity = itc_similarity(images, encoded).numpy()
    scores = rerank(model, images, encoded, top_k=TOP_K, batch_size=100)
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in texts])
    ways = scores.image_to_text.numpy(), scores.text_to_image.numpy()
    return {
        "itc": retrieval_metrics(similarity, similarity, owner, num_resamples=50, seed=0),
        "itm": retrieval_metrics(*ways, owner, num_resamples=50, seed=0),
    }


def test_ray_changes_nothing_about_the_metrics(result, corpus, model_folder):
    assert result.metrics == by_hand(corpus, model_folder)


def test_every_row_is_counted_and_what_is_left_out_is_named(result):
    assert result.undecodable == (f"picture-{BROKEN:03d}",)
    assert result.without_text == (f"picture-{SILENT:03d}",)
    assert result.num_empty_captions == 3
    assert result.num_images == NUM_IMAGES - 2
    assert result.num_texts == 2 * (NUM_IMAGES - 2)


def test_rows_are_kept_by_name_and_their_mean_is_mean_recall(result, config, model_folder):
    subject = subject_of(
        "retrieval", config, model=model_folder, corpus_id=read_manifest(config.corpus).content_id
    )
    rows = read_rows(RunHandle(result.tracking_uri, result.run_id), subject)
    assert rows is not None
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == len(keys) == result.num_images + result.num_texts
    assert {"picture-003", "picture-003 0", "picture-003 1"} <= set(keys)
    assert not any(f"picture-{number:03d}" in keys for number in (BROKEN, SILENT))
    for stage in ("itc", "itm"):
        means = rows.group_by("part").aggregate([(stage, "mean")])[f"{stage}_mean"].to_numpy()
        assert means.mean() == pytest.approx(result.metrics[stage]["mean_recall"].value)
    other = subject_of(
        "retrieval", replace(config, top_k=2), model=model_folder, corpus_id=subject.corpus_id
    )
    assert read_rows(RunHandle(result.tracking_uri, result.run_id), other) is None


def test_progress_ends_with_every_picture(result, heard):
    pictures = [news for news in heard if news[0] == "images"]
    assert pictures == [("images", 16, 40), ("images", 32, 40), ("images", 40, 40)]


def test_the_json_holds_everything(result, config):
    written = json.loads(config.json.read_text())
    assert written["metrics"]["itm"]["mean_recall"] == asdict(result.metrics["itm"]["mean_recall"])
    assert written["corpus_id"] == read_manifest(config.corpus).content_id
    assert written["num_undecodable"] == written["num_without_text"] == 1
    assert written["top_k"] == TOP_K
    assert set(written["seconds"]) == {"load", "images", "texts", "scores", "metrics"}


def test_a_model_without_a_run_is_logged_in_one_of_its_own(result):
    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    metrics, found = run.data.metrics, result.metrics
    assert metrics["eval/held_out/tr_r5"] == found["itm"]["tr_r5"].value
    assert metrics["eval/held_out/itc/ir_r1"] == found["itc"]["ir_r1"].value
    assert metrics["eval/held_out/mean_recall_low"] == found["itm"]["mean_recall"].low
    assert metrics["eval/held_out/mean_recall_chance"] == found["itm"]["mean_recall"].chance
    assert run.data.params["top_k"] == str(TOP_K)
    assert run.info.status == "FINISHED"
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "eval" / "held_out"
    names = sorted(path.name for path in folder.iterdir())
    pictures = ["best.png", "evaluate.json", "recall.png", "retrieval.json", "sweep.png"]
    assert names == [*pictures, "worst.png"]
    assert run.data.tags["eval.held_out.protocol"] == "zero-shot"


def test_the_logged_config_starts_the_same_evaluation_from_any_folder(result, config):
    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    folder = Path(run.info.artifact_uri.removeprefix("file://")) / "eval" / "held_out"
    assert read_config(folder / "evaluate.json", EvaluateConfig) == config


def test_the_table_shows_each_metric_with_interval_and_chance(result):
    console = Console(file=StringIO(), width=120)
    console.print(summary_table(result))
    printed = console.file.getvalue()
    mean = result.metrics["itm"]["mean_recall"]
    assert f"{100 * mean.value:.1f}  ({100 * mean.low:.1f} - {100 * mean.high:.1f})" in printed
    assert f"ITM on the top {TOP_K}" in printed
    assert "Retrieval, zero-shot, on held_out" in printed
    assert f"{100 * mean.chance:.1f}" in printed


def test_a_model_from_a_run_is_logged_in_that_run_and_two_actors_find_the_same(
    result, config, model_folder
):
    run = open_run("train", model_folder, run_name="training", params={}, tags={})
    again = evaluate_retrieval(replace(config, json=None, actors=2))
    assert again.run_id == run.run_id
    assert (again.metrics, again.slices) == (result.metrics, result.slices)
    assert (again.sweep, again.num_pairs) == (result.sweep, result.num_pairs)
    for name, cases in again.cases.items():
        for case, expected in zip(cases, result.cases[name], strict=True):
            assert case.match == pytest.approx(expected.match, rel=1e-5)
            assert replace(case, match=0) == replace(expected, match=0)
    logged = MlflowClient(run.uri).get_run(run.run_id)
    assert logged.data.metrics["eval/held_out/tr_r1"] == again.metrics["itm"]["tr_r1"].value
    assert logged.info.status == "RUNNING"


def test_a_damaged_model_is_one_line_from_the_actor(local_ray, config, model_folder, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors: no such file") as caught:
        evaluate_retrieval(replace(config, model=str(tmp_path)))
    assert "Traceback" not in str(caught.value)


def test_more_actors_than_cpus_are_refused(local_ray, config):
    with pytest.raises(InputError, match=r"--actors 3: Ray has 2 CPUs\. Take at most 2"):
        evaluate_retrieval(replace(config, actors=3))


def test_the_sweep_ends_in_the_headline_and_judges_no_pair_for_it_alone(result):
    assert [point.top_k for point in result.sweep] == [1, 2, 4, TOP_K]
    costs = [point.num_pairs for point in result.sweep]
    assert costs == sorted(costs)
    assert costs[-1] == result.num_pairs
    assert result.sweep[-1].mean_recall == result.metrics["itm"]["mean_recall"]


def test_a_folder_tells_its_protocol_and_no_flag_contradicts_it(config, model_folder, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(model_folder, tuned)
    body = json.loads((tuned / "config.json").read_text()) | {"tuned_for": "retrieval"}
    (tuned / "config.json").write_text(json.dumps(body))
    assert protocol_of(config, model_folder) == "zero-shot"
    assert protocol_of(config, tuned) == "fine-tuned"
    after_coco = replace(config, protocol="zero-shot-after-coco")
    assert protocol_of(after_coco, tuned) == "zero-shot-after-coco"
    with pytest.raises(InputError, match=r"--protocol zero-shot-after-coco: .* is not fine-tuned"):
        protocol_of(after_coco, model_folder)
    with pytest.raises(InputError, match=r"--protocol zero-shot: .* is fine-tuned"):
        protocol_of(replace(config, protocol="zero-shot"), tuned)


def test_an_official_checkpoint_needs_a_protocol_from_the_user(config, tmp_path):
    official = tmp_path / "flickr30k.pth"
    official.touch()
    assert protocol_of(replace(config, protocol="fine-tuned"), official) == "fine-tuned"
    with pytest.raises(InputError, match=r"does not say .* Add --protocol zero-shot"):
        protocol_of(config, official)


def test_another_resolution_is_taken_only_when_asked_for(config, model_folder):
    sizes, *_ = read_folder_config(model_folder)
    assert resolution_of(config, sizes) == 16
    larger = replace(config, image_size=24)
    with pytest.raises(InputError, match=r"--image-size 24: .* is for 16 pixels"):
        resolution_of(larger, sizes)
    assert resolution_of(replace(larger, resize_positions=True), sizes) == 24
    with pytest.raises(InputError, match="--image-size 20: patches of 8 pixels do not fill it"):
        resolution_of(replace(config, image_size=20, resize_positions=True), sizes)


def test_an_absent_model_is_refused(local_ray, config):
    with pytest.raises(InputError, match="--model nowhere: no such file or folder"):
        evaluate_retrieval(replace(config, model="nowhere"))


def test_cuda_without_a_gpu_is_refused(local_ray, config):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="--device cuda: Ray sees no GPU"):
        evaluate_retrieval(replace(config, device="cuda"))


def test_a_corpus_of_nothing_usable_is_one_line(local_ray, config, tmp_path):
    row = picture_row(0) | {"captions": ["?!"]}
    write_corpus(tmp_path, [row], rows_per_shard=4, rows_per_group=4)
    with pytest.raises(InputError, match="none of its 1 pictures"):
        evaluate_retrieval(replace(config, corpus=tmp_path))
