"""The quickstart through every stage, with few pictures and few steps."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from albef_core.errors import InputError
from albef_core.weights import load_model
from pipelines.config import QuickstartConfig
from pipelines.config_file import read_config
from pipelines.evaluate import OnProgress
from pipelines.manifest import read_manifest, read_rows
from pipelines.model_store import StoredModel, verify
from pipelines.quickstart import promote_quickstart, quickstart
from pipelines.shapes import shapes_picture, true_captions


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"batch_size": 2, "workers": 3}, "--batch-size 2 .* --workers 3"),
        ({"num_images": 50, "batch_size": 64}, "--batch-size 64 is more than the 50 images"),
    ],
)
def test_impossible_flags_are_refused_before_an_earlier_quickstart_is_lost(
    flags: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "made-by-quickstart").touch()
    (tmp_path / "summary.json").write_text("kept")

    with pytest.raises(InputError, match=sentence):
        quickstart(QuickstartConfig(out=tmp_path, **flags))

    assert (tmp_path / "summary.json").read_text() == "kept"


def test_a_ray_of_several_machines_is_refused_before_an_earlier_quickstart_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "made-by-quickstart").touch()
    (tmp_path / "summary.json").write_text("kept")
    monkeypatch.setattr("pipelines.quickstart.connect", lambda: None)
    nodes = [{"Alive": True}, {"Alive": False}, {"Alive": True}]
    monkeypatch.setattr("pipelines.quickstart.ray.nodes", lambda: nodes)

    with pytest.raises(InputError, match=r"for one machine.* Unset RAY_ADDRESS"):
        quickstart(QuickstartConfig(out=tmp_path))

    assert (tmp_path / "summary.json").read_text() == "kept"


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("kept")

    with pytest.raises(InputError, match="holds files that no quickstart made"):
        quickstart(QuickstartConfig(out=tmp_path))

    assert (tmp_path / "thesis.tex").read_text() == "kept"


def captions_of(num_images: int) -> int:
    return sum(len(true_captions(0, index)) for index in range(num_images))


@pytest.mark.cluster
@pytest.mark.slow
def test_every_stage_runs_and_the_headline_is_the_one_named_beforehand(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = QuickstartConfig(
        out=tmp_path / "out", num_images=64, num_held_out=24, steps=3, batch_size=16, workers=1
    )
    last: dict[str, tuple[int, int]] = {}

    @contextmanager
    def bars() -> Iterator[OnProgress]:
        yield lambda stage, done, total: last.update({stage: (done, total)})

    summary = quickstart(config, bars=bars)

    written = json.loads((config.out / "summary.json").read_text())
    assert set(written["metrics"]) == {"itc", "itm"}
    headline = written["metrics"]["itm"]["mean_recall"]
    assert (written["headline"], written["mean_recall"]) == ("itm", headline["value"])
    assert written["chance"] == headline["chance"]
    assert written["times_chance"] == round(headline["value"] / headline["chance"], 2)
    assert written["corpus_id"] != written["held_out_corpus_id"]
    assert read_config(config.out / "config.json", QuickstartConfig) == config
    assert load_model(summary.folders["model"]).report.missing == ()
    assert last["pictures to train on"] == (64, 64)
    dead = len(range(20, 65, 20))
    listed = dict.fromkeys(["refused", "pending"], 0) | {"ok": 64, "failed": dead}
    assert written["crawled"] == listed | {"duplicate": captions_of(64) - 64}
    corpus = read_manifest(Path(summary.folders["corpus"]))
    rows = list(read_rows(corpus, ["sha256", "captions"]))
    drawn = [shapes_picture(0, index) for index in range(64)]
    assert {(digest, *captions) for digest, captions in rows} == {
        (hashlib.sha256(one.encoded).digest(), *one.captions) for one in drawn
    }
    assert last["held-out pictures"] == (24, 24)
    assert last["images"] == (24, 24)
    assert written["champion_uri"] == written["model_uri"] == "models:/albef-quickstart/1"
    assert written["promotion"].startswith(f"promoted: {headline['value']:.1%}; there is no champ")
    champion = verify("models:/albef-quickstart@champion", with_checkpoint=True)
    assert champion.card is not None
    assert champion.card.provenance.corpus.content_id == written["corpus_id"]
    assert "optimizer.pt" in champion.card.provenance.checkpoint

    # Another quickstart would give the same model: no version is better than itself.
    client = MlflowClient(summary.tracking_uri)
    own = client.get_model_version("albef-quickstart", "1")
    again = client.create_model_version(
        "albef-quickstart", own.source, own.run_id, tags=dict(own.tags)
    )
    stored = StoredModel(f"models:/albef-quickstart/{again.version}", str(again.version))
    uri, why = promote_quickstart(stored, Path(summary.folders["held_out"]), tmp_path / "g.yaml")
    assert uri == "models:/albef-quickstart/1"
    assert "+0.00 points" in why
