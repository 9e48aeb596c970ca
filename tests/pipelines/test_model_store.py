import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from albef_core.errors import InputError
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model
from pipelines.model_store import download_model, is_model_uri, log_model
from pipelines.tracking import RunHandle, open_run, tracking_uri
from tests.pipelines.small_model import save_small_model


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite store for this file: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield folder


@pytest.fixture
def client(store):
    return MlflowClient(tracking_uri())


@pytest.fixture
def run(store, tmp_path):
    return open_run("test", tmp_path / "run", run_name="r", params={}, tags={})


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    tokenizer = Tokenizer.learn(["a red circle", "a green dog runs"] * 4, vocab_size=60)
    save_small_model(folder, tokenizer)
    return folder


def test_a_logged_model_is_a_version_that_load_model_reads(client, run, model_folder):
    stored = log_model(run, model_folder, register="albef-test", tags={"corpus.id": "abc"})
    assert stored.uri == f"models:/albef-test/{stored.version}"
    version = client.get_model_version("albef-test", stored.version)
    assert version.run_id == run.run_id
    assert version.tags["corpus.id"] == "abc"
    folder = download_model(stored.uri)
    assert RunHandle.of(folder) == run
    loaded, trained = load_model(folder).model, load_model(model_folder).model
    torch.testing.assert_close(loaded.state_dict(), trained.state_dict())
    client.set_registered_model_alias("albef-test", "challenger", stored.version)
    assert download_model("models:/albef-test@challenger") == folder


@pytest.mark.slow  # starts a process that imports MLflow and torch
def test_a_logged_model_holds_no_pickle_and_answers_in_a_fresh_process(
    run, store, model_folder, tmp_path
):
    stored = log_model(run, model_folder)
    assert stored.version == ""
    whole = download_model(stored.uri).parents[1]
    assert not [p for p in whole.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    program = (
        "import io, sys, json\n"
        "import mlflow, pandas as pd\n"
        "from PIL import Image\n"
        f"model = mlflow.pyfunc.load_model({stored.uri!r})\n"
        "picture = io.BytesIO(); Image.new('RGB', (9, 5), 'red').save(picture, 'PNG')\n"
        "rows = pd.DataFrame({'image': [picture.getvalue()] * 40,"
        " 'text': ['a red circle', '!'] * 20})\n"
        "answer = model.predict(rows)\n"
        "import albef_core\n"
        "print(json.dumps({'code': albef_core.__file__, **answer.to_dict('list')}))\n"
    )
    answered = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answered.returncode == 0, answered.stderr
    answer = json.loads(answered.stdout.splitlines()[-1])
    assert Path(answer["code"]).is_relative_to(whole)
    assert len(answer["match"]) == len(answer["similarity"]) == 40
    assert all(0 < probability < 1 for probability in answer["match"])
    assert all(-1.001 < similarity < 1.001 for similarity in answer["similarity"])
    assert answer["match"][0] != answer["match"][1]


def test_a_model_that_the_registry_lacks_is_one_line(store):
    with pytest.raises(InputError, match="models:/nothing/1: not to be had"):
        download_model("models:/nothing/1")


@pytest.mark.parametrize(
    ("source", "is_uri"),
    [("models:/a/1", True), ("models:/a@b", True), ("runs:/x/model", True), ("models/a", False)],
)
def test_a_uri_is_told_from_a_path(source, is_uri):
    assert is_model_uri(source) is is_uri
