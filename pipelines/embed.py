"""A corpus in, Parquet of embeddings out: one file a shard, each of them written once."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from albef_core.errors import InputError
from albef_core.weights import load_model
from pipelines.config import EmbedConfig
from pipelines.config_file import write_config
from pipelines.embedder import Embedding, embedded_tables, is_null
from pipelines.manifest import SHARD_FOLDER, Manifest, Shard, read_manifest
from pipelines.model_card import model_digest
from pipelines.model_store import find_model

OnProgress = Callable[[str, int, int], None]
"""Hears the stage, how much of it is done, and how much it is in all."""
VERSION = 1
ORIGIN_NAME = "origin.json"
"""What the embeddings are of; there from the start, so that nothing else is mixed in."""
LIST_NAME = "embeddings.json"
"""The list of files; there once all are."""
FILE_FOLDER = "embeddings"
UNDECODABLE, EMPTY = b"num_undecodable", b"num_empty_captions"
"""Counts in the metadata of each file."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What embeddings are of: files of one folder have one origin."""

    version: int
    corpus_id: str
    model_sha256: str
    """Over the model's weights, sizes and vocabulary, wherever they lie."""
    feature_size: int


@dataclass(frozen=True, kw_only=True)
class EmbeddingList:
    """All that was embedded, as `embeddings.json` holds it."""

    origin: Origin
    model: str
    corpus: str
    num_images: int
    num_captions: int
    num_undecodable: int
    """Pictures that do not decode; the numbers of their embedding are null."""
    num_empty_captions: int
    """Captions of which cleaning leaves nothing; the numbers of their embedding are null."""
    files: tuple[Shard, ...]
    """In the order of the corpus; names are relative to `embeddings`."""


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What an `embed` has done."""

    embeddings: EmbeddingList
    num_written: int
    """Files written now; the others were there."""
    seconds: float


def embed(
    config: EmbedConfig, *, on_progress: OnProgress = lambda stage, done, total: None
) -> EmbedResult:
    """Write the embeddings of all pictures and captions of a corpus, in its order.

    Each shard of the corpus gives one file of the same name, written by rename; a file that is
    there already is not made again, so the same command goes on after an interruption. The list of
    them comes last. Columns are those of `embedder.embedded_tables`: the vectors have length 1, and
    the product of two is their cosine (ITC).

    Raises:
        InputError: model or corpus is absent or damaged, or `out` holds embeddings of others.
    """
    started = time.monotonic()
    manifest, folder = read_manifest(config.corpus), find_model("--model", config.model)
    model_config = load_model(folder).model_config
    origin = Origin(
        version=VERSION,
        corpus_id=manifest.content_id,
        model_sha256=model_digest(folder),
        feature_size=model_config.feature_size,
    )
    _begin(config, origin)
    missing = [shard for shard in manifest.shards if not _is_done(config.out, shard)]
    if missing:
        embedding = Embedding(
            model=folder,
            batch_size=config.batch_size,
            actors=config.actors,
            device=config.device,
        )
        names = {shard.name for shard in missing}
        groups = [group for group in manifest.row_groups() if group.shard in names]
        tables = iter(embedded_tables(manifest, groups, embedding, model_config))
        num_done = manifest.num_images - sum(shard.rows for shard in missing)
        for shard in missing:
            size = sum(group.shard == shard.name for group in groups)
            _write(config.out, manifest, shard, islice(tables, size))
            num_done += shard.rows
            on_progress("pictures", num_done, manifest.num_images)
    listed = _listed(config, manifest, origin)
    _write_json(config.out / LIST_NAME, asdict(listed))
    seconds = round(time.monotonic() - started, 1)
    return EmbedResult(embeddings=listed, num_written=len(missing), seconds=seconds)


def _begin(config: EmbedConfig, origin: Origin) -> None:
    """Claim an empty folder for this origin, or see that it is already claimed for it."""
    path = config.out / ORIGIN_NAME
    if path.is_file():
        found = json.loads(path.read_text())
        for name, wanted in asdict(origin).items():
            if found.get(name) != wanted:
                raise InputError(
                    f"--out {config.out}: holds embeddings of another"
                    f" {'corpus' if name == 'corpus_id' else 'model'} ({name}"
                    f" {str(found.get(name))[:16]}, not {str(wanted)[:16]}). Choose another folder."
                )
        return
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(
            f"--out {config.out}: holds other things than embeddings. Choose another folder."
        )
    (config.out / FILE_FOLDER).mkdir(parents=True, exist_ok=True)
    write_config(config, config.out / "config.json")
    _write_json(path, asdict(origin))


def _is_done(out: Path, shard: Shard) -> bool:
    path = out / FILE_FOLDER / shard.name
    return path.is_file() and pq.read_metadata(path).num_rows == shard.rows


def _write(out: Path, manifest: Manifest, shard: Shard, tables: Iterable[pa.Table]) -> None:
    """Write one file; it appears whole or never."""
    table = pa.concat_tables(tables)
    ids = pq.read_table(manifest.folder / SHARD_FOLDER / shard.name, columns=["image_id"])
    assert table["image_id"].equals(ids["image_id"]), "every row once, in the order of the corpus"
    texts = pa.chunked_array([chunk.flatten() for chunk in table["caption_embeddings"].chunks])
    counts = {
        UNDECODABLE: str(sum(is_null(table["image_embedding"]))),
        EMPTY: str(sum(is_null(texts))),
    }
    path = out / FILE_FOLDER / shard.name
    partial = path.with_name(f"{path.name}.tmp")
    # Numbers of unit vectors hardly repeat: neither a dictionary nor compression would pay.
    pq.write_table(
        table.replace_schema_metadata(counts),
        partial,
        row_group_size=manifest.rows_per_group,
        compression="NONE",
        use_dictionary=False,
    )
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _listed(config: EmbedConfig, manifest: Manifest, origin: Origin) -> EmbeddingList:
    files, num_undecodable, num_empty = [], 0, 0
    for shard in manifest.shards:
        path = config.out / FILE_FOLDER / shard.name
        counts = pq.read_schema(path).metadata
        num_undecodable += int(counts[UNDECODABLE])
        num_empty += int(counts[EMPTY])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(Shard(shard.name, shard.rows, path.stat().st_size, digest))
    return EmbeddingList(
        origin=origin,
        model=config.model,
        corpus=str(config.corpus),
        num_images=manifest.num_images,
        num_captions=manifest.num_captions,
        num_undecodable=num_undecodable,
        num_empty_captions=num_empty,
        files=tuple(files),
    )


def _write_json(path: Path, body: object) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(body, indent=1) + "\n")
    partial.replace(path)
