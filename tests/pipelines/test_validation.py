"""What a training says about held-out pictures between its epochs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from albef_core.api import Albef
from albef_core.errors import InputError
from albef_core.metrics import retrieval_metrics
from albef_core.weights import load_model
from pipelines.checkpoint_store import best_curve
from pipelines.examples import collect_examples
from pipelines.manifest import Manifest
from pipelines.pairs import open_corpus
from pipelines.presets import tiny
from pipelines.train import collect_held_out
from pipelines.validation import retrieve_pairs
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import save_small_model, words_of

NUM_IMAGES, DAMAGED = 70, 3


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    """More pictures than a batch; one of them does not decode."""
    rows = [picture_row(number) for number in range(NUM_IMAGES)]
    rows[DAMAGED]["image"] = b"no picture"
    return write_corpus(tmp_path / "corpus", rows, rows_per_shard=64, rows_per_group=16)


def test_pairs_are_retrieved_as_the_api_retrieves_them(corpus: Manifest, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", words_of(corpus))
    loaded = load_model(tmp_path / "model")
    loaded.model.train()

    rows = retrieve_pairs(loaded, corpus.folder, collect_examples(corpus, "retrieval").table)

    found = rows.curves
    assert loaded.model.training
    sources = [open_corpus(corpus.folder).read(n) for n in range(NUM_IMAGES) if n != DAMAGED]
    for n, source in enumerate(sources):
        (tmp_path / f"{n}.jpg").write_bytes(source.image)
    albef = Albef(loaded)
    images = albef.embed_images([tmp_path / f"{n}.jpg" for n in range(len(sources))])
    texts = albef.embed_texts([text for source in sources for text in source.captions])
    owners = np.repeat(np.arange(len(sources)), 2)
    metrics = retrieval_metrics(images @ texts.T, images @ texts.T, owners, num_resamples=1, seed=0)
    assert found["val/mean_recall"] == pytest.approx(metrics["mean_recall"].value)
    assert found["val/tr_r1"] == pytest.approx(metrics["tr_r1"].value)
    assert found["val/error"] == pytest.approx(1 - metrics["mean_recall"].value)
    ways = [rows.scores[rows.parts == part].mean() for part in (0, 1)]
    assert np.mean(ways) == pytest.approx(metrics["mean_recall"].value)
    assert DAMAGED not in rows.pictures
    counts = np.bincount(rows.pictures, minlength=NUM_IMAGES)
    assert set(np.delete(counts, DAMAGED)) == {1 + 2}, "a picture is a query, and so are its texts"


def test_held_out_pictures_of_which_none_decodes_are_refused(tmp_path: Path) -> None:
    rows = [picture_row(0) | {"image": b"no picture"}]
    corpus = write_corpus(tmp_path / "corpus", rows, rows_per_shard=1, rows_per_group=1)
    save_small_model(tmp_path / "model", words_of(corpus))
    table = collect_examples(corpus, "retrieval").table
    with pytest.raises(InputError, match=r"--val .*: no picture decodes"):
        retrieve_pairs(load_model(tmp_path / "model"), corpus.folder, table)


def test_pictures_that_are_learned_from_are_not_held_out(corpus: Manifest) -> None:
    config = dataclasses.replace(tiny(), corpus=corpus.folder)
    assert collect_held_out(config, "retrieval", corpus) is None
    same = dataclasses.replace(config, val=corpus.folder)
    with pytest.raises(InputError, match=r"--val .*: is what --corpus holds"):
        collect_held_out(same, "retrieval", corpus)


def test_the_best_is_what_the_held_out_pictures_say_where_there_are_some() -> None:
    assert best_curve(tiny()) == "train/loss/total"
    assert best_curve(dataclasses.replace(tiny(), val=Path("held-out"))) == "val/error"
    assert best_curve(dataclasses.replace(tiny(), val=Path("x"), keep_best="")) == ""
