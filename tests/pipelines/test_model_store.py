import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from albef_core.errors import InputError
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model
from pipelines.checkpoint_files import read_mark
from pipelines.model_store import (
    download_model,
    find_model,
    is_model_uri,
    log_checkpoint,
    log_model,
    verify,
)
from pipelines.served_outputs import differences, serve
from pipelines.tracking import RunHandle, open_run, tracking_uri
from tests.pipelines.small_model import made_by_hand, save_small_model


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
    stored = log_model(
        run,
        model_folder,
        provenance=made_by_hand(),
        register="albef-test",
        tags={"corpus.id": "abc"},
    )
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
    stored = log_model(run, model_folder, provenance=made_by_hand())
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


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Callable[[], None]:
    """Change a file; give what puts it right again."""
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    return lambda: path.write_bytes(whole) and None


def flipped(whole: bytes) -> bytes:
    return whole[:-1] + bytes([whole[-1] ^ 1])


@pytest.fixture(scope="module")
def stored(store, model_folder, tmp_path_factory):
    """A registered model, whose files a test may damage if it mends them again."""
    folder = tmp_path_factory.mktemp("run")
    run = open_run("test", folder, run_name="r", params={}, tags={})
    state = log_checkpoint(run, model_folder)
    made = made_by_hand(checkpoint=state)
    return log_model(run, model_folder, provenance=made, register="albef-card")


def test_the_card_tells_what_every_file_must_be_and_what_the_model_said(stored, model_folder):
    fetched = verify(stored.uri, with_checkpoint=True)
    card = fetched.card
    assert card is not None
    assert card.provenance == made_by_hand(checkpoint=card.provenance.checkpoint)
    inside = {p.relative_to(fetched.mlflow_model).as_posix() for p in whole_files(fetched)}
    assert inside - set(card.files) == {"card.json"}
    assert card.files["artifacts/model/model.safetensors"] == read_mark(
        model_folder / "model.safetensors"
    )
    assert len(card.recorded.outputs) == 2
    rows = pd.DataFrame(card.recorded.inputs)
    assert differences(card.recorded.outputs, serve(fetched.folder, rows)) == []


def whole_files(fetched) -> list[Path]:
    made_since = ("__pycache__", "registered_model_meta")
    files = [path for path in fetched.mlflow_model.rglob("*") if path.is_file()]
    return [path for path in files if not set(made_since) & set(path.parts)]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("artifacts/model/model.safetensors", flipped, r"has sha256 \w{64}, recorded was \w{64}"),
        ("artifacts/model/vocab.txt", lambda whole: whole + b"x\n", r"has \d+ bytes, recorded"),
        ("code/albef_core/model.py", lambda whole: whole.replace(b"a", b"b", 1), "has sha256"),
        ("MLmodel", lambda whole: whole.replace(b"code_model", b"code_evil!"), "has sha256"),
        ("card.json", lambda whole: whole.replace(b"corrected", b"paper2021"), "has sha256"),
    ],
)
def test_a_changed_byte_is_refused_wherever_the_model_is_used(stored, name, change, sentence):
    mend = damaged(verify(stored.uri).mlflow_model / name, change)
    try:
        with pytest.raises(InputError, match=f"{re.escape(f'{stored.uri}: {name}')} {sentence}"):
            find_model("--model", stored.uri)
    finally:
        mend()
    assert verify(stored.uri).card


def test_a_missing_file_is_refused_and_named(stored):
    path = verify(stored.uri).folder / "tokenizer.json"
    whole = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(InputError, match=r"artifacts/model/tokenizer\.json is missing"):
            download_model(stored.uri)
    finally:
        path.write_bytes(whole)


def test_a_changed_checkpoint_is_refused_when_it_is_asked_for(stored, client):
    run_id = client.get_model_version("albef-card", stored.version).run_id
    root = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    mend = damaged(root / "checkpoint" / "model.safetensors", flipped)
    try:
        assert verify(stored.uri).card
        with pytest.raises(InputError, match=r"checkpoint: model\.safetensors has sha256"):
            verify(stored.uri, with_checkpoint=True)
    finally:
        mend()


def test_answers_are_compared_within_what_machines_differ_by():
    before = [{"answer": "red", "probability": 0.5}, {"answer": "two", "probability": 0.25}]
    near = [{"answer": "red", "probability": 0.5004}, {"answer": "two", "probability": 0.25}]
    far = [{"answer": "blue", "probability": 0.5}, {"answer": "two", "probability": 0.252}]
    assert differences(before, near) == []
    assert differences(before, far) == [
        "answer of row 0 is blue, recorded was red",
        "probability of row 1 is 0.252, recorded was 0.25",
    ]
