"""The input of ingest: which of the accepted forms it has, and every picture that it lists."""

from dataclasses import dataclass
from pathlib import Path

from albef_core.errors import InputError
from pipelines.config import IngestConfig
from pipelines.json_lists import list_json
from pipelines.records import Entry, Listing
from pipelines.shapes import shapes_id, shapes_picture
from pipelines.tars import list_tars

ACCEPTED = (
    "Accepted are `shapes`, a JSON list of entries with `image` and `caption`, WebDataset tars"
    " (KEY.jpg with KEY.txt or KEY.json), a tar of pictures with one JSON list beside it, a folder"
    " or a pattern of such files."
)


@dataclass(frozen=True, slots=True)
class ShapesRecord:
    """A picture of the generated set."""

    seed: int
    index: int
    wrong_captions: float
    extra_words: float
    split: str | None = None

    @property
    def image_id(self) -> str:
        """Name of the picture."""
        return shapes_id(self.seed, self.index)

    def load(self) -> Entry:
        """Make the picture."""
        made = shapes_picture(
            self.seed,
            self.index,
            wrong_captions=self.wrong_captions,
            extra_words=self.extra_words,
        )
        return Entry(made.encoded, made.captions, annotations=made.annotations)


def list_records(config: IngestConfig) -> Listing:
    """Recognize the form of `--source` and list what is in it.

    `shapes` is the generated set. Otherwise the source names files, by path, by pattern, or as a
    folder that holds them (its `*.json`; without any, its `*.tar`). `.json` files are lists of
    entries; tars with captions inside are WebDatasets; a tar without goes with the one JSON list
    beside it.

    Raises:
        InputError: the source is anything else.
    """
    if config.source == "shapes":
        shares = config.wrong_captions, config.extra_words
        numbers = range(config.num_images)
        return Listing([ShapesRecord(config.seed, number, *shares) for number in numbers])
    files = _find_files(config.source)
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".json"}:
        return list_json(files, config.images)
    if suffixes != {".tar"}:
        raise InputError(f"--source {config.source}: found {_enumerate(files)}. {ACCEPTED}")
    if config.images is not None:
        raise InputError("--images goes with a JSON list; a tar holds its own. Leave it out.")
    listing = list_tars(files)
    if listing.records or len(files) > 1:
        return listing
    lists = sorted(files[0].parent.glob("*.json"))
    if len(lists) != 1:
        found = f"{len(lists)} JSON lists ({_enumerate(lists)})" if lists else "no JSON list"
        raise InputError(
            f"--source {config.source}: a tar without captions, with {found} beside it."
            " Pass the list: --source LIST.json --images THIS.tar."
        )
    return list_json(lists, files[0])


def _find_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(path.glob("*.json")) or sorted(path.glob("*.tar"))
        what = "a folder with neither *.json nor *.tar"
    else:
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        what = "no such file, and nothing that matches it as a pattern"
    if not files:
        raise InputError(f"--source {source}: {what}. {ACCEPTED}")
    return files


def _enumerate(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"
