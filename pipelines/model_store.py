"""Models in MLflow: a model folder goes in with its run, and comes out by its URI."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipelines.tracking import RunHandle, check_server, fetch_artifact, tracking_uri

# isort: split
# After tracking.py, which says how MLflow is to start.
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model as save_pyfunc
from mlflow.types import ColSpec, DataType, Schema, TensorSpec

import albef_core
from albef_core.errors import InputError
from albef_core.weights import task_of_model
from pipelines.checkpoint_files import FileMark
from pipelines.model_card import (
    CARD_FILE,
    CARD_TAG,
    Card,
    Provenance,
    Recorded,
    check_marks,
    marks_of,
    read_card,
)
from pipelines.served_outputs import as_text, example, serve

PAIR: list[ColSpec | TensorSpec] = [
    ColSpec(DataType.binary, "image"),
    ColSpec(DataType.string, "text"),
]
SIGNATURE = ModelSignature(
    inputs=Schema(PAIR),
    outputs=Schema([ColSpec(DataType.double, "similarity"), ColSpec(DataType.double, "match")]),
)
ANSWERS = Schema([ColSpec(DataType.string, "answer"), ColSpec(DataType.double, "probability")])
TWO_PICTURES = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "left"), *PAIR]), outputs=ANSWERS
)
TASK_SIGNATURES = {
    "entailment": ModelSignature(inputs=Schema(PAIR), outputs=ANSWERS),
    "vqa": ModelSignature(inputs=Schema(PAIR), outputs=ANSWERS),
    "nlvr2": TWO_PICTURES,
    "text-assignment": TWO_PICTURES,
}
"""What a model that is fine-tuned for a task takes and gives."""
REQUIREMENTS = (
    "jaxtyping",
    "numpy",
    "opencv-python-headless",
    "pandas",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
)


CHECKPOINT = "checkpoint"
"""Artifact of a run: the whole training state that its model was taken from."""


@dataclass(frozen=True)
class StoredModel:
    """A model as MLflow knows it."""

    uri: str
    """`models:/name/version`, or `models:/m-...` when it was not registered."""
    version: str
    """Version in the registry; empty when it was not registered."""


@dataclass(frozen=True, kw_only=True)
class FetchedModel:
    """A model out of MLflow, whose every byte has been compared with its card."""

    folder: Path
    """Model folder."""
    mlflow_model: Path
    """What MLflow keeps: the model folder, the code that serves it, the card."""
    card: Card | None
    """None: it was logged before there were cards, and nothing could be compared."""


def log_checkpoint(handle: RunHandle, folder: Path) -> dict[str, FileMark]:
    """Store the whole state of a training as the run's artifact `checkpoint/`; mark its files."""
    MlflowClient(handle.uri).log_artifacts(handle.run_id, str(folder), CHECKPOINT)
    return marks_of(folder)


def log_model(
    handle: RunHandle,
    model_folder: Path,
    *,
    provenance: Provenance,
    name: str = "model",
    register: str = "",
    tags: Mapping[str, str] | None = None,
) -> StoredModel:
    """Store a model folder with its run, as `mlflow.pyfunc` loads it.

    With `register` it becomes the next version under that name in the model registry. The code that
    answers queries travels as source (models from code), the weights as safetensors: nothing is
    pickled. Its card (`model_card.Card`) travels with it, and the card's hash is a tag of both.
    """
    tags = {key: str(value) for key, value in (tags or {}).items()}
    task = task_of_model(model_folder)
    signature = TASK_SIGNATURES.get(task, SIGNATURE)
    rows = example(has_left=signature is TWO_PICTURES)
    recorded = Recorded(inputs=as_text(rows), outputs=serve(model_folder, rows))
    handle.save(model_folder)
    client = MlflowClient(handle.uri, registry_uri=handle.uri)
    run = client.get_run(handle.run_id)
    entry = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=handle.run_id,
        tags=tags,
        model_type="ALBEF",
    )
    client.log_outputs(handle.run_id, [LoggedModelOutput(entry.model_id, step=0)])
    description = Model(
        artifact_path=entry.artifact_location,
        model_uuid=entry.model_id,
        run_id=handle.run_id,
        model_id=entry.model_id,
    )
    with tempfile.TemporaryDirectory(prefix="albef-model-") as scratch:
        folder = Path(scratch) / "model"
        save_pyfunc(
            folder,
            mlflow_model=description,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"model": str(model_folder.absolute())},
            code_paths=[str(Path(albef_core.__file__).parent)],
            signature=signature,
            input_example=rows,
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        )
        card = Card(provenance=provenance, recorded=recorded, files=marks_of(folder))
        tags[CARD_TAG] = card.write(folder / CARD_FILE)
        client.log_model_artifacts(entry.model_id, str(folder))
    client.set_logged_model_tags(entry.model_id, {CARD_TAG: tags[CARD_TAG]})
    client.finalize_logged_model(entry.model_id, "READY")
    if not register:
        return StoredModel(f"models:/{entry.model_id}", "")
    try:
        client.create_registered_model(register)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        register, f"models:/{entry.model_id}", handle.run_id, tags=tags, model_id=entry.model_id
    )
    return StoredModel(f"models:/{register}/{made.version}", str(made.version))


def is_model_uri(source: str) -> bool:
    """Tell an MLflow URI (`models:/name/1`, `models:/name@alias`, `runs:/id/model`) from a path."""
    return re.match(r"(models|runs):/", source) is not None


def find_model(flag: str, source: str) -> Path:
    """Find the model that a flag names by its path, absolute, or fetch it by its MLflow URI.

    Raises:
        InputError: there is none.
    """
    if is_model_uri(source):
        return download_model(source)
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"{flag} {source}: no such file or folder. Give a run's model folder, an official"
            " checkpoint, or a registry URI such as models:/albef-pretrain/1."
        )
    return path.absolute()  # actors and workers have other folders


def download_model(uri: str) -> Path:
    """Fetch a model that `log_model` stored; return its model folder.

    Raises:
        InputError: the store has no such model, another program logged it, or a file of it is not
            what was logged.
    """
    return verify(uri).folder


def verify(uri: str, *, with_checkpoint: bool = False) -> FetchedModel:
    """Fetch a model and compare each of its files, by size and SHA-256, with its card.

    `with_checkpoint` also compares the stored training state, which may be large.

    Raises:
        InputError: a file is missing or differs, or there is no such model.
    """
    store = tracking_uri()
    check_server(store)
    client = MlflowClient(store, registry_uri=store)
    try:
        folder = Path(download_artifacts(uri, tracking_uri=store, registry_uri=store))
        tags = _tags_of(client, uri, folder)
    except MlflowException as error:
        raise InputError(
            f"{uri}: not to be had from the MLflow store {store} ({error.message})."
            " Check name and version, or set MLFLOW_TRACKING_URI to the store that has it."
        ) from None
    card = None
    if CARD_TAG in tags:
        card = read_card(folder / CARD_FILE, sha256=tags[CARD_TAG], whose=uri)
        check_marks(folder, card.files, whose=uri)
    description = Model.load(folder)
    if with_checkpoint and card and card.provenance.checkpoint:
        run = RunHandle(store, description.run_id or "")
        with tempfile.TemporaryDirectory(prefix="albef-checkpoint-") as scratch:
            state = fetch_artifact(run, CHECKPOINT, Path(scratch)) or Path(scratch)
            whose = f"{uri}: {CHECKPOINT}"
            check_marks(state, card.provenance.checkpoint, whose=whose)
    artifact = description.flavors.get("python_function", {}).get("artifacts", {}).get("model")
    if artifact is None:
        raise InputError(
            f"{uri}: not a model of this project (it has no artifact `model`)."
            " Pass one that jobs/pretrain.py registered."
        )
    return FetchedModel(folder=folder / artifact["path"], mlflow_model=folder, card=card)


def _tags_of(client: MlflowClient, uri: str, folder: Path) -> dict[str, str]:
    """Read the tags of a version, or of the model behind any other URI."""
    if version := version_of(client, uri):
        return version.tags
    model_id = uri.removeprefix("models:/")
    if model_id == uri and (folder / "MLmodel").is_file():
        model_id = Model.load(folder).model_id or ""
    return client.get_logged_model(model_id).tags


def version_of(client: MlflowClient, uri: str) -> ModelVersion | None:
    """Find the version that `models:/name/3` or `models:/name@alias` means; None for other URIs."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@(.+))", uri)
    if match is None:
        return None
    name, number, alias = match.groups()
    if number:
        return client.get_model_version(name, number)
    return client.get_model_version_by_alias(name, alias)
