"""A corpus without some of its captions: a new corpus with an identity of its own."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from albef_core.errors import InputError
from pipelines.manifest import (
    SCHEMA,
    Manifest,
    Shard,
    content_id,
    read_row_group,
    read_rows,
    tool_version,
    write_manifest,
    write_shard,
)


def write_cleaned(
    source: Manifest,
    dropped: Mapping[int, Collection[int]],
    out: Path,
    *,
    settings: dict[str, Any],
) -> Manifest:
    """Copy a corpus without some captions, and without the pictures that then have none.

    `dropped` says by row, counted over the corpus, which captions go, by their place among the
    row's. Rows stay in their order, and in the shards of their names. `settings` is what the new
    manifest says of how it was made. At most a row group is in memory.

    Raises:
        InputError: nothing is left.
    """
    shards, first = [], 0
    for shard in source.shards:
        rows = _kept(source, shard, first, dropped)
        shards.append(write_shard(out, shard.name, rows, rows_per_group=source.rows_per_group))
        first += shard.rows
    kept = tuple(shard for shard in shards if shard is not None)
    if not kept:
        raise InputError(f"{out}: no caption of {source.folder} would be left. Drop fewer.")
    cleaned = replace(
        source,
        folder=out,
        shards=kept,
        num_images=sum(shard.rows for shard in kept),
        num_uncaptioned=0,
        settings=settings,
        tool_version=tool_version(),
    )
    counts, num_captions = Counter[str](), 0
    for name, captions in read_rows(cleaned, ["source", "captions"]):
        counts[name] += 1
        num_captions += len(captions)
    told = read_rows(cleaned, ["image_id", "sha256", "captions", "annotations"])
    cleaned = replace(
        cleaned,
        content_id=content_id(told),
        num_captions=num_captions,
        sources=dict(sorted(counts.items())),
    )
    write_manifest(cleaned)
    return cleaned


def _kept(
    source: Manifest, shard: Shard, first: int, dropped: Mapping[int, Collection[int]]
) -> Iterator[dict[str, Any]]:
    row_number = first
    for group in source.row_groups():
        if group.shard != shard.name:
            continue
        table = read_row_group(source.folder, shard.name, group.index, SCHEMA.names)
        for row in table.to_pylist():
            gone = dropped.get(row_number, ())
            row["captions"] = [c for n, c in enumerate(row["captions"]) if n not in gone]
            row_number += 1
            if row["captions"]:
                yield row
