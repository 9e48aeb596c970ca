"""Models that answer always the same, evaluated for real when they are weighed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from albef_core.config import Recipe, TextConfig
from albef_core.tasks.entailment import EntailmentModel
from albef_core.tasks.folder import save_task
from albef_core.tasks.labels import ENTAILMENT_LABELS
from albef_core.weights import read_folder_config
from pipelines import weighing
from pipelines.config_file import write_config
from pipelines.manifest import Manifest
from pipelines.model_store import log_model
from pipelines.promote import promote
from pipelines.registry_config import Check, Gate, PromoteConfig
from pipelines.tracking import open_run
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import made_by_hand, save_small_model, words_of

NUM_IMAGES = 32


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    """Every sentence that is said of these pictures follows from them."""
    said = json.dumps({"entailment": [{"sentence": "it is so", "label": "entailment"}]})
    rows = [picture_row(number) | {"annotations": said} for number in range(NUM_IMAGES)]
    return write_corpus(tmp_path / "held-out", rows, rows_per_shard=32, rows_per_group=32)


def save_constant(folder: Path, corpus: Manifest, label: str) -> None:
    """Write a model of entailment that always says the same."""
    words = words_of(corpus)
    sizes = folder.with_name("sizes")
    save_small_model(sizes, words)
    config = read_folder_config(sizes)[0]
    torch.manual_seed(0)
    model = EntailmentModel(config)
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(
            torch.tensor([float(one == label) for one in ENTAILMENT_LABELS])
        )
    save_task(
        folder,
        model,
        task="entailment",
        model_config=config,
        text_config=TextConfig(),
        recipe=Recipe(),
        tokenizer=words,
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_what_was_not_evaluated_yet_is_and_only_once(
    local_ray: None, corpus: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for label in ("neutral", "entailment"):
        save_constant(tmp_path / label / "model", corpus, label)
        run = open_run("test", None, run_name=label, params={}, tags={})
        made = made_by_hand(corpus)
        log_model(run, tmp_path / label / "model", provenance=made, register="albef-entailment")
    wanted = Check(task="entailment", corpus=corpus.folder)
    gate = tmp_path / "gate.yaml"
    write_config(Gate(model="albef-entailment", checks=(wanted,)), gate)
    evaluated: list[str] = []

    def counted(do: Callable) -> Callable:
        def counting(task: str, config: weighing.EvaluateTaskConfig, **more: object) -> object:
            evaluated.append(config.model)
            return do(task, config, **more)

        return counting

    monkeypatch.setattr(weighing, "evaluate_task", counted(weighing.evaluate_task))
    first, better = (promote(PromoteConfig(gate=gate, candidate=name)) for name in ("1", "2"))

    assert evaluated == ["models:/albef-entailment/1", "models:/albef-entailment/2"]
    assert first.decision
    assert better.decision
    assert first.decision.reasons[0].found.startswith("0.0%")
    assert better.decision.reasons[0].found == (
        "100.0%, champion 0.0%: +100.00 points (+100.00 to +100.00, 32 pictures)"
    )
    assert better.outcome
    assert better.outcome.result == "done"
