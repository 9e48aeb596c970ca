"""Small sources for ingest, and the commit of one in the test's own process."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import Unit, commit_unit
from pipelines.sources import list_records


def picture(number: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A picture unlike those of other numbers."""
    image = Image.new("RGB", size, (250, 240, 230))
    x = number * 7 % 25
    ImageDraw.Draw(image).rectangle((x, 3, x + 9, 20), fill=(number * 40 % 256, 90, 160))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_list(folder: Path, entries: list, name: str = "cats.json") -> Path:
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def write_pictures(folder: Path, *names: str) -> None:
    """Write JPEGs of 40 x 30 pixels, no two alike."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(number)))


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


def config_of(source: Path | str, out: Path, **options) -> IngestConfig:
    return IngestConfig(source=str(source), out=out, **options)


def commit(source: Path, out: Path, **options) -> tuple[list[dict], list[tuple[str, str]]]:
    """List and commit a source in this process; return its rows, sorted, and what was bad."""
    listing = list_records(config_of(source, out, **options))
    unit = Unit("shard-00000.parquet", listing.records)
    summary = commit_unit(unit, folder=out, rows_per_group=256)
    bad = [(one.kind, one.name) for one in (*listing.bad, *summary.bad)]
    if summary.shard is None:
        return [], bad
    table = pq.read_table(out / "shards" / summary.shard.name)
    return sorted(table.to_pylist(), key=lambda row: row["image_id"]), bad


def told(rows: list[dict]) -> dict[str, dict | None]:
    """The annotations of each row, by its id."""
    return {
        row["image_id"]: None if row["annotations"] is None else json.loads(row["annotations"])
        for row in rows
    }
