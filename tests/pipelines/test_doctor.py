"""The doctor over good settings and bad ones: real Ray, a real corpus, a real MLflow store."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, Recipe, TextConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tokenizer import Tokenizer
from albef_core.weights import save_model
from pipelines.config import PretrainConfig
from pipelines.doctor import Diagnosis, examine
from pipelines.doctor_bench import Bench, Numbers
from pipelines.doctor_cluster import NodeFacts, compare
from pipelines.doctor_corpus import check_corpus, check_tokenizer, open_tokenizer
from pipelines.doctor_finding import Finding, Problem
from pipelines.doctor_memory import Room, largest_that
from pipelines.doctor_mlflow import EXPERIMENT
from pipelines.doctor_storage import check_storage, checkpoint_bytes
from pipelines.doctor_training import check_weights, judge_numbers, judge_rates, judge_room
from pipelines.doctor_worker import FeedRate, StepRate
from pipelines.manifest import read_manifest
from pipelines.presets import base, tiny
from tests.conftest import SmallCorpus

RATES = "feed and step"
CHECKS = [
    "corpus",
    "tokenizer",
    "starting weights",
    "storage",
    "MLflow",
    "workers",
    "largest batch",
    RATES,
    "NaN",
]
GOOD = dict.fromkeys(CHECKS, "pass") | {RATES: "measured"}


def setting(corpus: Path, root: Path, **changes: object) -> PretrainConfig:
    """A pre-training that could start."""
    preset = tiny()
    config = dataclasses.replace(
        preset,
        corpus=corpus,
        storage=root / "runs",
        name="run",
        batch_size=64,
        model=dataclasses.replace(preset.model, image_layers=2),
    )
    return dataclasses.replace(config, **changes)


def with_leaks(corpus: Path, leaks: dict[str, int]) -> Path:
    report = corpus / "report" / "report.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps({"leaks": leaks}))
    return corpus


def model_folder(folder: Path, tokenizer: Path, *, value: float) -> Path:
    """Save a small model, one weight of which holds `value`."""
    words = Tokenizer.load(tokenizer)
    sizes = dataclasses.replace(setting(folder, folder).model, vocab_size=words.vocab_size)
    torch.manual_seed(0)
    model = ALBEF(sizes)
    with torch.no_grad():
        model.image_projection.weight[0, 0] = value
    text = TextConfig(tokenizer="corpus")
    save_model(
        folder, model, model_config=sizes, text_config=text, recipe=Recipe(), tokenizer=words
    )
    return folder


def verdicts(diagnosis: Diagnosis) -> dict[str, str]:
    """Name the verdicts, but for one: how fast the feed is says what else the machine does now."""
    found = {finding.check: finding.verdict for finding in diagnosis.findings}
    if "pairs/s" in row(diagnosis, RATES).measured:
        found[RATES] = "measured"
    return found


def row(diagnosis: Diagnosis, check: str) -> Finding:
    return next(finding for finding in diagnosis.findings if finding.check == check)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_good_setting_passes_everything_and_leaves_nothing_behind(
    local_ray: None,
    make_corpus: Callable[..., SmallCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    corpus = with_leaks(make_corpus(203).folder, {"flickr-test": 0})
    diagnosis = examine(setting(corpus, tmp_path))
    assert verdicts(diagnosis) == GOOD, diagnosis.findings
    assert diagnosis.has_failed == (row(diagnosis, RATES).verdict == "fail")
    assert diagnosis.seconds < 120
    assert sum(finding.seconds for finding in diagnosis.findings) <= diagnosis.seconds
    assert diagnosis.report == tmp_path / "runs" / "doctor.json"
    saved = json.loads(diagnosis.report.read_text())
    assert saved["findings"] == [dataclasses.asdict(finding) for finding in diagnosis.findings]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["doctor.json"]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == [
        "FINISHED"
    ]


@pytest.mark.cluster
@pytest.mark.slow
def test_each_trouble_fails_its_own_row_and_the_others_stay(
    local_ray: None,
    make_corpus: Callable[..., SmallCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Root may write anywhere, but not below a file.
    (tmp_path / "runs").write_text("not a folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    corpus = with_leaks(make_corpus(200, broken=range(0, 200, 10)).folder, {"flickr-test": 0})
    config = setting(corpus, tmp_path, device="cuda")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=50))
    diagnosis = examine(config)
    troubled = {"corpus", "tokenizer", "storage", "MLflow", "workers"}
    assert verdicts(diagnosis) == GOOD | dict.fromkeys(troubled, "fail"), diagnosis.findings
    assert diagnosis.has_failed
    assert "--max-bad-share 0.01" in row(diagnosis, "corpus").remedy
    assert "--vocab-size 50" in row(diagnosis, "tokenizer").remedy
    assert "give another --storage" in row(diagnosis, "storage").remedy
    assert "MLFLOW_TRACKING_URI" in row(diagnosis, "MLflow").remedy
    assert "the cluster has 0 GPUs" in row(diagnosis, "workers").remedy
    assert diagnosis.report is None


@pytest.mark.cluster
@pytest.mark.slow
def test_nan_in_the_starting_weights_fails_the_probe_alone_and_names_the_weight(
    local_ray: None,
    make_corpus: Callable[..., SmallCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    corpus = make_corpus(203)
    start = model_folder(tmp_path / "nan", corpus.tokenizer, value=math.nan)
    config = setting(with_leaks(corpus.folder, {"flickr-test": 0}), tmp_path, init=str(start))
    diagnosis = examine(config)
    assert verdicts(diagnosis) == GOOD | {"NaN": "fail"}
    assert "image_projection.weight" in row(diagnosis, "NaN").remedy
    assert "0 missing" in row(diagnosis, "starting weights").measured


@pytest.mark.cluster
def test_without_time_left_every_check_says_that_it_had_none(
    local_ray: None, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    seen: list[str] = []
    diagnosis = examine(setting(small_corpus.folder, tmp_path), budget_s=0, on_check=seen.append)
    assert seen == CHECKS
    assert verdicts(diagnosis) == dict.fromkeys(CHECKS, "warn")
    assert {finding.measured for finding in diagnosis.findings} == {"not looked at"}


def test_the_worst_problem_decides_and_its_remedy_comes_first() -> None:
    finding = Finding.of("seen", [Problem("warn", "Later."), Problem("fail", "Now.")])
    assert (finding.verdict, finding.remedy) == ("fail", "Now. Later.")
    assert Finding.of("seen").verdict == "pass"


def test_a_corpus_without_leak_report_is_a_warning_and_a_leak_a_failure(
    make_corpus: Callable[..., SmallCorpus], tmp_path: Path
) -> None:
    corpus = make_corpus(70).folder
    config, manifest = setting(corpus, tmp_path), read_manifest(corpus)
    assert "Not checked against the test sets" in check_corpus(config, manifest).remedy
    with_leaks(corpus, {"flickr-test": 0, "coco-test": 3})
    finding = check_corpus(config, manifest)
    assert finding.verdict == "fail"
    assert "3 of coco-test" in finding.remedy
    assert "flickr-test" not in finding.remedy


def test_a_corpus_with_pictures_without_captions_is_refused_before_ray_is_asked_for(
    make_corpus: Callable[..., SmallCorpus], tmp_path: Path
) -> None:
    corpus = make_corpus(8, uncaptioned=[2, 5]).folder
    with pytest.raises(InputError, match="2 of 8 pictures have no caption"):
        examine(setting(corpus, tmp_path))


def test_a_batch_larger_than_the_corpus_fails_with_its_size(
    make_corpus: Callable[..., SmallCorpus], tmp_path: Path
) -> None:
    corpus = with_leaks(make_corpus(40).folder, {"flickr-test": 0})
    finding = check_corpus(setting(corpus, tmp_path), read_manifest(corpus))
    assert finding.verdict == "fail"
    assert "at most 40" in finding.remedy


def test_captions_that_the_vocabulary_does_not_know_or_that_are_cut_are_a_warning(
    small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    other = tmp_path / "vocab.txt"
    other.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\n")
    config = setting(small_corpus.folder, tmp_path)
    config = dataclasses.replace(config, text=TextConfig(tokenizer=str(other), max_tokens=3))
    manifest = read_manifest(small_corpus.folder)
    tokenizer, num_words = open_tokenizer(config, manifest)
    finding = check_tokenizer(tokenizer, num_words, config, manifest)
    assert finding.verdict == "warn"
    assert "--tokenizer corpus" in finding.remedy
    assert "--max-tokens" in finding.remedy


def test_a_tokenizer_that_loses_the_captions_fails(
    small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    config = setting(small_corpus.folder, tmp_path)
    manifest = read_manifest(small_corpus.folder)
    tokenizer, num_words = open_tokenizer(config, manifest)
    tokenizer._pieces = tokenizer._pieces[::-1]  # ids that mean other words
    finding = check_tokenizer(tokenizer, num_words, config, manifest)
    assert finding.verdict == "fail"
    assert "does not give captions back" in finding.remedy


def test_a_random_start_is_a_warning_only_where_published_weights_would_fit(
    tmp_path: Path,
) -> None:
    tags = {"weights.image": "random start", "weights.text": "random start"}
    assert check_weights(setting(tmp_path, tmp_path), tags).verdict == "pass"
    published = dataclasses.replace(base(), corpus=tmp_path, text_weights="random")
    finding = check_weights(published, tags)
    assert finding.verdict == "warn"
    assert "--text-weights" in finding.remedy
    assert "--image-weights" not in finding.remedy


def test_the_size_of_a_checkpoint_is_that_of_the_tensors_in_it(tmp_path: Path) -> None:
    sizes = ModelConfig(
        image_size=32, image_width=32, image_layers=1, image_heads=4, text_width=32, text_heads=4,
        text_mlp_width=64, text_layers=1, fusion_layers=1, vocab_size=100, max_positions=32,
        feature_size=16,
    )  # fmt: skip
    config = setting(tmp_path, tmp_path, model=sizes)
    own = sum(parameter.numel() for parameter in ALBEF(sizes).parameters())
    queues = 2 * config.objective.num_slots * (16 * 4 + 8 + 1)
    few = own - sum(p.numel() for p in ALBEF(sizes).itm_head.parameters()) - 1
    assert checkpoint_bytes(config) == 4 * (3 * own + few) + queues


def test_a_store_behind_a_url_is_written_and_read_back(tmp_path: Path) -> None:
    model = dataclasses.replace(tiny().model, vocab_size=100)
    config = setting(tmp_path, tmp_path, checkpoints="memory://doctor/run", model=model)
    finding = check_storage(config)
    assert finding.verdict == "pass", finding
    assert "memory://doctor/run: written" in finding.measured


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "file:///proc/nowhere/run"])
def test_a_store_that_is_not_there_fails_by_its_flag(url: str, tmp_path: Path) -> None:
    model = dataclasses.replace(tiny().model, vocab_size=100)
    finding = check_storage(setting(tmp_path, tmp_path, checkpoints=url, model=model))
    assert finding.verdict == "fail"
    assert f"--checkpoints {url}" in finding.remedy
    assert f"{tmp_path}/runs: written" in finding.measured


def test_too_little_room_fails_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    model = dataclasses.replace(tiny().model, vocab_size=100)
    finding = check_storage(setting(tmp_path, tmp_path, model=model))
    assert finding.verdict == "fail"
    assert "lower --keep-last" in finding.remedy


def facts(**changes: object) -> NodeFacts:
    same = NodeFacts(node="a", versions={"torch": "2"}, commit="c", sees_corpus=True, offset_s=0.0)
    return dataclasses.replace(same, **changes)


@pytest.mark.parametrize(
    ("change", "verdict", "remedy"),
    [
        ({"versions": {"torch": "1"}}, "fail", "torch 1"),
        ({"commit": "d"}, "fail", "commit d"),
        ({"sees_corpus": False}, "fail", "does not see the corpus"),
        ({"offset_s": -3.0}, "warn", "-3.0 s"),
    ],
)
def test_a_node_that_differs_is_named(change: dict, verdict: str, remedy: str) -> None:
    (problem,) = compare(facts(), [facts(), facts(node="b", **change)])
    assert problem.verdict == verdict
    assert "Node b" in problem.remedy
    assert remedy in problem.remedy


def test_a_node_without_git_is_not_another_commit() -> None:
    assert compare(facts(), [facts(commit="unknown")]) == []


def test_a_feed_slower_than_the_step_fails_with_the_cpus_it_would_need(tmp_path: Path) -> None:
    config = setting(tmp_path, tmp_path, workers=2, batch_size=16)
    feed = FeedRate(pairs_per_s=100, first_s=1, cpus=3)
    step = StepRate(pairs_per_s=400, num_pairs=8, device="GPU")
    finding = judge_rates(feed, step, config, num_images=160)
    assert finding.verdict == "fail"
    assert "75%" in finding.remedy
    assert "15 CPUs per worker" in finding.remedy  # 3 * 400 / 100, and a fifth more
    # 10 epochs of 10 steps of 16 pairs at 2 * 100 pairs/s
    assert "100 steps take 8 s" in finding.measured
    hardly = dataclasses.replace(feed, pairs_per_s=410)
    assert judge_rates(hardly, step, config, num_images=160).verdict == "warn"
    quick = dataclasses.replace(feed, pairs_per_s=500)
    assert judge_rates(quick, step, config, num_images=160).verdict == "pass"


def test_a_batch_that_does_not_fit_is_cut_into_equal_micro_batches(tmp_path: Path) -> None:
    room = Room(
        largest=30,
        is_measured=True,
        at_least=False,
        bytes_per_pair=1e9,
        memory_bytes=40e9,
        seconds_per_pair=0.1,
    )
    config = setting(tmp_path, tmp_path, batch_size=128, workers=2)
    finding = judge_room(room, config)
    assert finding.verdict == "fail"
    assert "--micro-batch-size 22," in finding.remedy  # 64 in three parts
    assert judge_room(room, dataclasses.replace(config, micro_batch_size=22)).verdict == "pass"


@pytest.mark.parametrize("limit", [0, 1, 5, 63, 64, 300, 512])
def test_the_search_ends_within_a_sixteenth_below_what_fits(limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    largest, is_open = largest_that(fits, first=8, most=512, limit_s=10)
    assert limit - max(1, limit // 16) <= largest <= limit
    assert is_open == (limit == 512)
    assert len(tried) == len(set(tried)) <= 12


def test_gradients_that_are_not_finite_are_named_with_a_remedy(tmp_path: Path) -> None:
    numbers = Numbers(
        num_pairs=8,
        losses={"ITC": 2.0},
        gradient_norm=math.inf,
        broken_weights=[],
        broken_gradients=["mlm_head.bias"],
    )
    finding = judge_numbers(numbers, setting(tmp_path, tmp_path, precision="bf16"))
    assert finding.verdict == "fail"
    assert "mlm_head.bias" in finding.remedy
    assert "--precision fp32" in finding.remedy


@pytest.fixture
def bench(small_corpus: SmallCorpus, tmp_path: Path) -> Bench:
    start = model_folder(tmp_path / "start", small_corpus.tokenizer, value=0.5)
    config = setting(small_corpus.folder, tmp_path)
    words = Tokenizer.load(small_corpus.tokenizer).vocab_size
    sizes = dataclasses.replace(config.model, vocab_size=words)
    return Bench(dataclasses.replace(config, model=sizes), start, torch.device("cpu"))


def test_trial_steps_leave_the_starting_weights_as_they_were(bench: Bench) -> None:
    before = {name: weight.clone() for name, weight in bench.student.named_parameters()}
    bench.seconds_of(bench.batch(4))
    bench.numbers(bench.batch(4))
    for name, weight in bench.student.named_parameters():
        assert weight.equal(before[name]), name


def test_a_model_at_random_guesses_words_and_matches_by_chance(bench: Bench) -> None:
    batch: PairBatch = bench.batch(16)
    numbers = bench.numbers(batch)
    assert numbers.are_finite
    # An untrained head is near the uniform guess: ln(V) and ln(2) nats.
    assert numbers.losses["MLM"] == pytest.approx(math.log(bench.vocab_size), rel=0.1)
    # The head's two logits differ by 0.02 * sqrt(2 * 128) = 0.3 nats; three times that costs 0.27.
    assert numbers.losses["ITM"] == pytest.approx(math.log(2), abs=0.27)


def test_room_on_a_cpu_is_estimated_from_small_steps_and_shared_by_workers(bench: Bench) -> None:
    alone = bench.room(64, limit_s=20, num_workers=1)
    shared = bench.room(64, limit_s=20, num_workers=4)
    assert alone is not None
    assert shared is not None
    assert alone.bytes_per_pair > 4 * 3 * 64 * 64, "a pair takes more than its own picture"
    assert alone.largest > shared.largest > 0
