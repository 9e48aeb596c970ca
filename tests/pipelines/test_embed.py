import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipelines.embed
from albef_core.api import Albef
from albef_core.errors import InputError
from pipelines.config import EmbedConfig
from pipelines.embed import embed
from pipelines.embedder import Embedding, embedded_tables
from pipelines.manifest import read_columns, read_manifest
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import encoded_here, save_small_model, words_of

ROOT = Path(__file__).parents[2]
NUM_IMAGES, BROKEN, SILENT, UNCAPTIONED = 11, 3, 5, 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of groups of four; one picture broken, a caption empty, a picture without any."""
    rows = [picture_row(number) for number in range(NUM_IMAGES)]
    rows[BROKEN]["image"] = rows[BROKEN]["image"][:200]
    rows[SILENT]["captions"] = ["?!", "a green picture"]
    rows[UNCAPTIONED] |= {"captions": [], "annotations": "{}"}
    folder = tmp_path_factory.mktemp("data") / "corpus"
    write_corpus(folder, rows, rows_per_shard=6, rows_per_group=4)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_small_model(folder, words_of(read_manifest(corpus)))
    return folder


@pytest.fixture
def config(tmp_path, corpus, model):
    return EmbedConfig(
        model=str(model), corpus=corpus, out=tmp_path / "out", batch_size=3, device="cpu"
    )


@pytest.fixture
def asked(monkeypatch):
    """Encode in this process, and tell which shards were asked for."""
    shards = []

    def tables(manifest, groups, *args):
        shards.append([group.shard for group in groups])
        return encoded_here(manifest, groups, *args)

    monkeypatch.setattr(pipelines.embed, "embedded_tables", tables)
    return shards


def written(out):
    listed = json.loads((out / "embeddings.json").read_text())
    tables = [pq.read_table(out / "embeddings" / file["name"]) for file in listed["files"]]
    return [row for table in tables for row in table.to_pylist()]


def test_the_embeddings_are_those_of_the_python_api_in_the_order_of_the_corpus(asked, config):
    done = embed(config)

    rows = written(config.out)
    stored = [row for table in read_columns(read_manifest(config.corpus), ["image_id", "captions"])
              for row in table.to_pylist()]  # fmt: skip
    assert [{name: row[name] for name in stored[0]} for row in rows] == stored
    albef = Albef.load(config.model)
    images = [row["image"] for table in read_columns(read_manifest(config.corpus), ["image"])
              for row in table.to_pylist()]  # fmt: skip
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        if number == BROKEN:
            assert row["image_embedding"] == [None] * 8
        else:
            (config.out / "picture.jpg").write_bytes(image)
            (expected,) = albef.embed_images([config.out / "picture.jpg"])
            np.testing.assert_allclose(row["image_embedding"], expected, rtol=0, atol=1e-6)
        has_words = [caption != "?!" for caption in row["captions"]]
        assert [vector != [None] * 8 for vector in row["caption_embeddings"]] == has_words
        texts = [text for text in row["captions"] if text != "?!"]
        found = [vector for vector in row["caption_embeddings"] if vector != [None] * 8]
        if texts:
            np.testing.assert_allclose(found, albef.embed_texts(texts), rtol=0, atol=1e-6)
    listed = done.embeddings
    assert (listed.num_undecodable, listed.num_empty_captions) == (1, 1)
    assert (listed.num_images, listed.num_captions) == (NUM_IMAGES, 2 * NUM_IMAGES - 2)


def test_columns_have_a_fixed_type(asked, config):
    embed(config)

    schema = pq.read_schema(config.out / "embeddings" / "part-00000.parquet")

    assert str(schema.field("image_embedding").type).startswith("fixed_size_list")
    assert str(schema.field("image_embedding").type).endswith("[8]")
    assert str(schema.field("caption_embeddings").type.value_type).endswith("[8]")


def test_only_the_file_that_is_missing_is_made_again(asked, config):
    assert embed(config).num_written == 2
    before = written(config.out)
    files = sorted((config.out / "embeddings").iterdir())
    kept, lost = (file.stat().st_mtime_ns for file in files)
    files[1].unlink()
    (config.out / "embeddings.json").unlink()

    assert embed(config).num_written == 1

    assert asked[1] == ["part-00001.parquet"] * 2
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].stat().st_mtime_ns != lost
    assert written(config.out) == before


def test_what_is_complete_is_not_touched(asked, config):
    first = embed(config).embeddings

    again = embed(config)

    assert (again.embeddings, again.num_written, len(asked)) == (first, 0, 1)


def test_the_list_names_every_file_with_its_hash(asked, config):
    listed = embed(config).embeddings

    manifest = read_manifest(config.corpus)
    assert [(file.name, file.rows) for file in listed.files] == [
        (shard.name, shard.rows) for shard in manifest.shards
    ]
    assert all(
        (config.out / "embeddings" / file.name).stat().st_size == file.bytes
        for file in listed.files
    )
    assert listed.origin.corpus_id == manifest.content_id


def test_an_interruption_leaves_whole_files_and_no_list(config, monkeypatch):
    def stops_after_the_first_shard(*args):
        tables = encoded_here(*args)
        yield next(tables)
        yield next(tables)
        yield next(tables)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.embed, "embedded_tables", stops_after_the_first_shard)
    with pytest.raises(KeyboardInterrupt):
        embed(config)

    assert [path.name for path in (config.out / "embeddings").iterdir()] == ["part-00000.parquet"]
    assert not (config.out / "embeddings.json").exists()


def test_embeddings_of_another_model_are_refused(asked, config, tmp_path):
    embed(config)
    save_small_model(tmp_path / "other", words_of(read_manifest(config.corpus)), seed=1)

    with pytest.raises(InputError, match=r"holds embeddings of another model \(model_sha256"):
        embed(replace(config, model=str(tmp_path / "other")))


def test_the_same_model_at_another_place_goes_on(asked, config, tmp_path):
    embed(config)
    save_small_model(tmp_path / "copy", words_of(read_manifest(config.corpus)))

    assert embed(replace(config, model=str(tmp_path / "copy"))).num_written == 0


def test_embeddings_of_another_corpus_are_refused(asked, config, tmp_path):
    embed(config)
    write_corpus(tmp_path / "other", [picture_row(50)], rows_per_shard=4, rows_per_group=4)

    with pytest.raises(InputError, match="holds embeddings of another corpus"):
        embed(replace(config, corpus=tmp_path / "other"))


def test_a_folder_of_other_things_is_refused(asked, config):
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("dear")

    with pytest.raises(InputError, match="holds other things than embeddings"):
        embed(config)


@pytest.mark.cluster
def test_ray_changes_nothing(local_ray, config, model, corpus):
    manifest = read_manifest(corpus)
    embedding = Embedding(model=model, batch_size=3, actors=1, device="cpu", has_match=True)
    sizes = Albef.load(model).loaded.model_config

    through_ray = list(embedded_tables(manifest, manifest.row_groups(), embedding, sizes))

    here = list(encoded_here(manifest, manifest.row_groups(), embedding, sizes))
    assert [len(table) for table in through_ray] == [4, 2, 4, 1]
    for one, other in zip(through_ray, here, strict=True):
        assert one.column_names == other.column_names
        for left, right in zip(one.to_pylist(), other.to_pylist(), strict=True):
            assert left["image_id"] == right["image_id"]
            assert left["captions"] == right["captions"]
            for name in ("image_embedding", "caption_embeddings", "match_log_odds"):
                np.testing.assert_allclose(flat(left[name]), flat(right[name]), rtol=0, atol=1e-5)


def flat(value):
    """List the numbers of nested lists; nothing is a number of its own."""
    if value is None:
        return [-99.0]
    return [x for one in value for x in flat(one)] if isinstance(value, list) else [value]


@pytest.mark.cluster
def test_more_actors_than_cpus_are_refused(local_ray, config):
    with pytest.raises(InputError, match=r"--actors 2: Ray has 2 CPUs.*Take at most 1"):
        embed(replace(config, actors=2))


@pytest.mark.slow
def test_a_missing_model_is_one_line_and_code_2(config):
    done = subprocess.run(
        [sys.executable, "jobs/embed.py", "--model", "gone", "--corpus", config.corpus,
         "--out", config.out],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--model gone: no such file or folder" in done.stderr
