"""Models in MLflow: a model folder goes in with its run, and comes out by its URI."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from pipelines.tracking import RunHandle, check_server, tracking_uri

# isort: split
# After tracking.py, which says how MLflow is to start.
import pandas as pd
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model as save_pyfunc
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from PIL import Image

import albef_core
from albef_core.errors import InputError
from albef_core.weights import task_of_model

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
    "timm",
    "tokenizers",
    "torch",
)


@dataclass(frozen=True)
class StoredModel:
    """A model as MLflow knows it."""

    uri: str
    """`models:/name/version`, or `models:/m-...` when it was not registered."""
    version: str
    """Version in the registry; empty when it was not registered."""


def log_model(
    handle: RunHandle,
    model_folder: Path,
    *,
    name: str = "model",
    register: str = "",
    tags: Mapping[str, str] | None = None,
) -> StoredModel:
    """Store a model folder with its run, as `mlflow.pyfunc` loads it.

    With `register` it becomes the next version under that name in the model registry. The code that
    answers queries travels as source (models from code), the weights as safetensors: nothing is
    pickled.
    """
    tags = {key: str(value) for key, value in (tags or {}).items()}
    task = task_of_model(model_folder)
    signature = TASK_SIGNATURES.get(task, SIGNATURE)
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
            input_example=_input_example(has_left=signature is TWO_PICTURES),
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        )
        client.log_model_artifacts(entry.model_id, str(folder))
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


def _input_example(*, has_left: bool) -> pd.DataFrame:
    picture = BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    pair = {"image": [picture.getvalue()], "text": ["a red square"]}
    return pd.DataFrame({"left": pair["image"], **pair} if has_left else pair)


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
        InputError: the store has no such model, or another program logged it.
    """
    store = tracking_uri()
    check_server(store)
    try:
        folder = Path(download_artifacts(uri, tracking_uri=store, registry_uri=store))
        flavor = Model.load(folder).flavors.get("python_function", {})
    except MlflowException as error:
        raise InputError(
            f"{uri}: not to be had from the MLflow store {store} ({error.message})."
            " Check name and version, or set MLFLOW_TRACKING_URI to the store that has it."
        ) from None
    artifact = flavor.get("artifacts", {}).get("model")
    if artifact is None:
        raise InputError(
            f"{uri}: not a model of this project (it has no artifact `model`)."
            " Pass one that jobs/pretrain.py registered."
        )
    return folder / artifact["path"]
