"""The input of ingest: which of the accepted forms it has, and every picture that it lists."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from albef_core.errors import InputError
from pipelines.annotation_extras import read_extras
from pipelines.ingest_config import CleaningConfig, IngestConfig
from pipelines.json_lists import list_json
from pipelines.records import Entry, Listing
from pipelines.shapes import shapes_id, shapes_picture
from pipelines.tars import list_tars

ACCEPTED = (
    "Accepted are `shapes`, JSON or JSON Lines of captions or annotations (ALBEF's lists,"
    " Karpathy's splits, SNLI-VE, VQA v2, NLVR2, COCO), WebDataset tars (KEY.jpg with KEY.txt or"
    " KEY.json), a tar of pictures with one list beside it, a folder or a pattern of such files,"
    " the folder of a crawl."
)
LIST_SUFFIXES = {".json", ".jsonl"}


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
    folder that holds them (its `*.json` and `*.jsonl`; without any, its `*.tar`). JSON is told
    apart by its content; tars with captions inside are WebDatasets; a tar without goes with the one
    list beside it.

    Raises:
        InputError: the source is anything else, or nothing in it is of `--split`.
    """
    if config.cleaning != CleaningConfig():
        raise InputError(
            f"--source {config.source}: cleaning is for crawls, and this is none. Leave out flags"
            f" as {_changed(config.cleaning)}."
        )
    if config.source == "shapes":
        refuse_flags(config, "`shapes`", "images", "annotations", "split")
        shares = config.wrong_captions, config.extra_words
        numbers = range(config.num_images)
        return Listing([ShapesRecord(config.seed, number, *shares) for number in numbers])
    files = _find_files(config.source)
    suffixes = {file.suffix.lower() for file in files}
    if suffixes <= LIST_SUFFIXES:
        return _list_json(config, files, config.images)
    if suffixes != {".tar"}:
        raise InputError(f"--source {config.source}: found {_enumerate(files)}. {ACCEPTED}")
    refuse_flags(config, "a tar, which holds its own", "images")
    listing = list_tars(files)
    if listing.records or len(files) > 1:
        refuse_flags(config, "WebDataset tars", "annotations")
        return _of_split(config, listing)
    lists = _lists_in(files[0].parent)
    if len(lists) != 1:
        found = f"{len(lists)} JSON lists ({_enumerate(lists)})" if lists else "no JSON list"
        raise InputError(
            f"--source {config.source}: a tar without captions, with {found} beside it."
            " Pass the list: --source LIST.json --images THIS.tar."
        )
    return _list_json(config, lists, files[0])


def _list_json(config: IngestConfig, files: list[Path], images: Path | None) -> Listing:
    extras = read_extras(config.annotations)
    return list_json(files, images, extras=extras, split=config.split)


def refuse_flags(config: IngestConfig, where: str, *names: str) -> None:
    """Refuse flags that mean nothing for such a source.

    Raises:
        InputError: one of the fields `names` is not at its default.
    """
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise InputError(f"--{field.name} does not go with {where}. Leave it out.")


def _changed(cleaning: CleaningConfig) -> str:
    """Name the flags of cleaning that are not at their defaults."""
    names = (
        field.name
        for field in fields(cleaning)
        if getattr(cleaning, field.name) != getattr(CleaningConfig(), field.name)
    )
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _of_split(config: IngestConfig, listing: Listing) -> Listing:
    if config.split == "all":
        return listing
    records = [record for record in listing.records if record.split == config.split]
    if not records:
        found = ", ".join(sorted({record.split or "no split" for record in listing.records}))
        raise InputError(
            f"--split {config.split}: the source has {found}. Pass one of those, or all."
        )
    return replace(listing, records=records)


def _find_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = _lists_in(path) or sorted(path.glob("*.tar"))
        what = "a folder with neither *.json nor *.jsonl nor *.tar"
    else:
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        what = "no such file, and nothing that matches it as a pattern"
    if not files:
        raise InputError(f"--source {source}: {what}. {ACCEPTED}")
    return files


def _lists_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in LIST_SUFFIXES)


def _enumerate(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"
