"""The daily acts as the README says, each submitted to a cluster, which loses a node at the end."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient

from albef_core.weights import load_model
from pipelines.checkpoint_files import read_state
from pipelines.promote import read_history
from tests.conftest import SmallCorpus, picture_row, write_corpus
from tests.jobs.own_cluster import (
    BIN,
    Cluster,
    clean_environment,
    kill,
    own_cluster,
    run_job,
    submit,
)

STEPS, EVERY = 40, 4
SMALL = "--image-size 32 --image-layers 1 --num-slots 16 --batch-size 8"
NOT_UPLOADED = {".git", ".venv", "__pycache__", "mlflow.db", "runs", "tests", "docs"}
GATE = """
model: albef-pretrain
checks:
  - {{task: retrieval, corpus: {corpus}, metric: itc, max_loss: 0.9}}
num_resamples: 50
min_pictures: 20
max_leak_share: 0.0
"""

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with own_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def test_ingest_pretrain_sweep_evaluate_promote_and_rollback(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, runs, gate = tmp_path / "corpus", tmp_path / "runs", tmp_path / "gate.yaml"
    rows = [picture_row(1000 + number) for number in range(24)]
    val = write_corpus(tmp_path / "val", rows, rows_per_shard=24, rows_per_group=16).folder
    gate.write_text(GATE.format(corpus=val))
    client = MlflowClient(cluster.mlflow_uri)
    run_job(cluster, f"jobs/ingest.py --source shapes --num-images 64 --out {corpus}")

    train = f"jobs/pretrain.py tiny --corpus {corpus} --storage {runs} --workers 0 {SMALL}"
    first = f"{train} --steps {STEPS} --log-every 1 --name first"
    stopped = submit(cluster, first, name="to-be-stopped")
    while stopped.poll() is None and not steps_of(client):
        time.sleep(0.2)
    stop_job(cluster, "to-be-stopped")
    output, _ = stopped.communicate()
    assert f"of {STEPS}, as asked" in output
    assert JobSubmissionClient(cluster.address).get_job_status("to-be-stopped") == "STOPPED"
    run_job(cluster, first)
    assert steps_of(client) == list(range(1, STEPS + 1)), "one run, and no step twice"
    run_job(cluster, f"{train} --steps 2 --name second --seed 5")
    versions = client.search_model_versions("name = 'albef-pretrain'")
    assert {version.version for version in versions} == {"1", "2"}

    sweep = f"jobs/sweep.py tiny --corpus {corpus} --val {val} --storage {runs} {SMALL} --steps 4"
    output = run_job(cluster, f"{sweep} --trials 2 --confirm-seeds 0 --name search")
    assert "python jobs/pretrain.py tiny" in output

    model = "models:/albef-pretrain/1"
    evaluate = f"jobs/evaluate.py retrieval --model {model} --corpus {val} --json {tmp_path}/e.json"
    run_job(cluster, evaluate)
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]

    promote = f"jobs/promote.py promote --gate {gate} --candidate"
    run_job(cluster, f"{promote} 1 --why begin")
    run_job(cluster, f"{promote} 2 --why newer")
    assert client.get_model_version_by_alias("albef-pretrain", "champion").version == "2"
    run_job(cluster, "jobs/promote.py rollback --model albef-pretrain --why regret")
    assert client.get_model_version_by_alias("albef-pretrain", "champion").version == "1"
    assert client.get_model_version_by_alias("albef-pretrain", "previous").version == "2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cluster.mlflow_uri)
    acts = read_history("albef-pretrain")
    assert [act.intent.why for act in acts] == ["begin", "newer", "regret"]


def steps_of(client: MlflowClient) -> list[int]:
    """List the steps of a loss that have reached the server, of the only training."""
    experiment = client.get_experiment_by_name("albef-pretrain")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    if not runs:
        return []
    history = client.get_metric_history(runs[0].info.run_id, "train/loss/total")
    return sorted(point.step for point in history)


def stop_job(cluster: Cluster, name: str) -> None:
    command = [str(BIN / "ray"), "job", "stop", "--address", cluster.address, name]
    subprocess.run(command, env=clean_environment(), check=True, capture_output=True)


def test_a_submitted_training_outlives_a_node_and_ends_with_a_run_and_a_model(
    cluster: Cluster, small_corpus: SmallCorpus, tmp_path: Path
) -> None:
    # So much that a node holds one worker, and two tasks of the feed beside it.
    flags = "--workers 2 --min-workers 1 --worker-cpus 1.2 --feed-cpus 0.4 --placement SPREAD"
    flags += f" --steps {STEPS} --log-every 1 --checkpoint-every {EVERY} {SMALL} --name submitted"
    paths = f"--corpus {small_corpus.folder} --storage {tmp_path / 'runs'}"
    run_dir = tmp_path / "runs" / "submitted"
    process = submit(cluster, f"jobs/pretrain.py tiny {flags} {paths}")

    while process.poll() is None and not list(run_dir.glob("checkpoint-*")):
        time.sleep(0.05)
    kill(cluster.nodes[1])
    output, _ = process.communicate()

    assert process.returncode == 0, output
    assert "jobs/evaluate.py retrieval --model" in output
    assert len(output.splitlines()) < 100, "lines of progress, no bars"
    client = MlflowClient(cluster.mlflow_uri)
    experiment = client.get_experiment_by_name("albef-pretrain")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "run_name = 'submitted'")
    assert (run.info.run_name, run.info.status) == ("submitted", "FINISHED")
    assert run.data.metrics["pairs_seen"] == 8 * STEPS
    points = client.get_metric_history(run.info.run_id, "train/loss/total")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))
    last = read_state(LocalFileSystem(), str(run_dir / f"checkpoint-{STEPS:08d}"))
    assert (last.progress.step, last.progress.world_size) == (STEPS, 1)
    assert load_model(run_dir / "model").report.missing == ()
    uploads = list(
        cluster.scratch.glob("*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    )
    files = [file for upload in uploads for file in upload.rglob("*")]
    assert {file.name for file in files} & NOT_UPLOADED == set()
    assert sum(file.stat().st_size for file in files) < 5e6


def test_a_refused_job_says_why_and_its_exit_code_is_kept(cluster: Cluster) -> None:
    process = submit(cluster, "jobs/pretrain.py tinny --corpus c")

    output, _ = process.communicate()

    assert "Did you mean tiny?" in output
    assert process.returncode == 1, "Ray makes 1 of every failure"
    jobs = JobSubmissionClient(cluster.address).list_jobs()
    (refused,) = (job for job in jobs if "tinny" in job.entrypoint)
    assert (refused.status, refused.driver_exit_code) == ("FAILED", 2)
