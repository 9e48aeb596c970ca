"""Lists of URLs with captions as they are published: what form each has, and all of its rows."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow.parquet as pq

from albef_core.errors import InputError
from pipelines.records import source_and_split

ACCEPTED = (
    "Accepted are TSV of two columns (CC3M, CC12M), SBU's JSON or its file of URLs beside that of"
    " captions, CSV and Parquet with named columns; each also as .gz, but for Parquet."
)
URL_COLUMNS = ("url", "image_url", "img_url", "urls", "image_urls")
CAPTION_COLUMNS = ("text", "caption", "captions", "alt", "alt_text", "top_caption")
SBU_URLS, SBU_CAPTIONS = "image_urls", "captions"
LOOKED_AT = 200
"""Lines that tell which column has the URLs."""
BATCH_ROWS = 8192
CHARS_AT_ONCE = 1 << 20
MAX_TEXT_CHARS = 1 << 20
"""Of one text of a JSON list; what has no end by then is damaged."""


class ListRow(NamedTuple):
    """One row as listed. With a `problem` it holds no pair; the texts are what could be read."""

    url: str
    caption: str
    problem: str = ""


@dataclass(frozen=True)
class UrlList:
    """One list: the files of one `--source`, in order, which have the same form."""

    name: str
    files: tuple[Path, ...]
    read_file: Callable[[Path], Iterator[ListRow]]

    @property
    def num_bytes(self) -> int:
        """Size of its files, by which a changed list is known."""
        return sum(file.stat().st_size for file in self.files)

    def rows(self) -> Iterator[ListRow]:
        """Read all rows, of which a few are in memory at a time."""
        for file in self.files:
            yield from self.read_file(file)


def find_list(source: str, *, url_column: str = "", caption_column: str = "") -> UrlList:
    """Find the files of a source and recognize their form, by the first one's name and content.

    Raises:
        InputError: there are none, or the form is not known.
    """
    files = _find_files(source)
    first = files[0]
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds))
        raise InputError(f"--source {source}: matches files of several kinds ({names}). Name one.")
    kind = kinds.pop()
    if kind == ".parquet":
        columns = _columns(pq.read_schema(first).names, first, url_column, caption_column)
        reader = partial(_read_parquet, columns=columns)
    elif kind == ".csv":
        with _open_text(first) as file:
            header = next(csv.reader(file), [])
        reader = partial(_read_csv, columns=_columns(header, first, url_column, caption_column))
    elif kind == ".json":
        reader = _read_sbu_json
        for key in (SBU_URLS, SBU_CAPTIONS):
            next(_strings(first, key), None)
    else:
        files, reader = _look_at_lines(source, files)
    name = source_and_split(Path(first.name.removesuffix(".gz")))[0]
    return UrlList(name or first.resolve().parent.name, files, reader)


def _find_files(source: str) -> tuple[Path, ...]:
    path = Path(source)
    if path.is_dir():
        raise InputError(f"--source {source}: is a folder. Give a pattern, as in '{source}/*.tsv'.")
    if path.is_file():
        return (path.absolute(),)
    root = Path(path.anchor)
    files = sorted(f.absolute() for f in root.glob(str(path.relative_to(path.anchor))))
    if not files:
        raise InputError(
            f"--source {source}: no such file, and nothing that matches it as a pattern. {ACCEPTED}"
        )
    return tuple(files)


def _kind(file: Path) -> str:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in (".parquet", ".csv", ".json") else "lines"


def _columns(
    names: Sequence[str], file: Path, url_column: str, caption_column: str
) -> tuple[str, str]:
    found = []
    for flag, asked, usual in (
        ("--url-column", url_column, URL_COLUMNS),
        ("--caption-column", caption_column, CAPTION_COLUMNS),
    ):
        wanted = (asked,) if asked else usual
        matches = [n for w in wanted for n in names if n == w or (not asked and n.lower() == w)]
        if not matches:
            raise InputError(
                f"{file}: no column {' or '.join(wanted)}, only {', '.join(names) or 'none'}."
                f" Name it with {flag}."
            )
        found.append(matches[0])
    return found[0], found[1]


def _open_bytes(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _open_text(file: Path) -> IO[str]:
    # Bytes that are no UTF-8 become surrogates, by which their row is found.
    opener: Any = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", errors="surrogateescape", newline="")


def _row(url: str | None, caption: str | None) -> ListRow:
    url, caption = url or "", caption or ""
    if not url.strip():
        return ListRow(url, _readable(caption), "no URL")
    try:
        (url + caption).encode("utf-8")
    except UnicodeEncodeError:
        return ListRow(_readable(url), _readable(caption), "not UTF-8")
    return ListRow(url, caption)


def _readable(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_parquet(file: Path, *, columns: tuple[str, str]) -> Iterator[ListRow]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(columns)):
            urls, captions = (batch[name].to_pylist() for name in columns)
            for url, caption in zip(urls, captions, strict=True):
                if not isinstance(url, str | None) or not isinstance(caption, str | None):
                    yield ListRow("", "", f"no text but {type(url).__name__}")
                else:
                    yield _row(url, caption)


def _read_csv(file: Path, *, columns: tuple[str, str]) -> Iterator[ListRow]:
    with _open_text(file) as lines:
        reader = csv.reader(lines)
        header = next(reader)
        url, caption = (header.index(name) for name in columns)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield ListRow("", "", str(error))
                continue
            if len(fields) != len(header):
                yield _malformed(",".join(fields), f"{len(fields)} fields, not {len(header)}")
            else:
                yield _row(fields[url], fields[caption])


def _malformed(line: str, problem: str) -> ListRow:
    return ListRow("", _readable(line), problem)


def _lines(file: Path) -> Iterator[str]:
    """Read lines that end with a line feed: other characters that end lines occur in captions."""
    with _open_bytes(file) as lines:
        for line in lines:
            yield line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _look_at_lines(
    source: str, files: tuple[Path, ...]
) -> tuple[tuple[Path, ...], Callable[[Path], Iterator[ListRow]]]:
    """Tell CC3M's columns from CC12M's, and SBU's two files from both."""
    votes, num_alone = [0, 0], 0
    for file in files:
        for line, _ in zip(_lines(file), range(LOOKED_AT), strict=False):
            fields = line.split("\t")
            num_alone += len(fields) == 1 and _is_url(line)
            for column, field in enumerate(fields[:2]):
                votes[column] += len(fields) == 2 and _is_url(field)
    if num_alone > max(votes):
        return _sbu_files(files), _read_sbu_files
    if votes[0] == votes[1]:
        found = "no column of URLs" if not votes[0] else "URLs in both columns"
        raise InputError(f"--source {source}: {found} in its first lines. {ACCEPTED}")
    return files, partial(_read_tsv, url_first=votes[0] > votes[1])


def _is_url(text: str) -> bool:
    return re.match(r"\s*https?://", text, re.IGNORECASE) is not None


def _read_tsv(file: Path, *, url_first: bool) -> Iterator[ListRow]:
    for line in _lines(file):
        fields = line.split("\t")
        if len(fields) != 2:
            yield _malformed(line, f"{len(fields)} fields, not 2")
        else:
            yield _row(*fields) if url_first else _row(fields[1], fields[0])


def _sbu_files(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Keep the files of URLs, and see that those of captions are beside them."""
    urls = tuple(file for file in files if "captions" not in file.name)
    for file in urls:
        if file == _captions_of(file) or not _captions_of(file).is_file():
            raise InputError(
                f"{file}: has URLs alone, and {_captions_of(file).name} is not beside it. Name the"
                " two as SBU does: ..._urls.txt and ..._captions.txt."
            )
    return urls


def _captions_of(file: Path) -> Path:
    return file.with_name(file.name.replace("urls", "captions"))


def _read_sbu_files(file: Path) -> Iterator[ListRow]:
    return _paired(_lines(file), _lines(_captions_of(file)))


def _read_sbu_json(file: Path) -> Iterator[ListRow]:
    return _paired(_strings(file, SBU_URLS), _strings(file, SBU_CAPTIONS))


def _paired(urls: Iterable[str], captions: Iterable[str]) -> Iterator[ListRow]:
    captions = iter(captions)
    for url in urls:
        caption = next(captions, None)
        yield _malformed(url, "no caption") if caption is None else _row(url, caption)
    for caption in captions:
        yield _malformed(caption, "no URL")


def _strings(file: Path, key: str) -> Iterator[str]:
    """Stream one list of texts out of a JSON object, whatever its size.

    Raises:
        InputError: the object has no such list, or something else in it.
    """
    with _open_text(file) as source:
        more = partial(source.read, CHARS_AT_ONCE)
        buffer, start = more(), re.compile(rf'(?<!\\)"{key}"\s*:\s*\[')
        while (found := start.search(buffer)) is None:
            if not (chunk := more()):
                raise InputError(f"{file}: no list {key!r}. {ACCEPTED}")
            buffer = buffer[-len(key) - 64 :] + chunk
        place, decoder = found.end(), json.JSONDecoder()
        while True:
            gap = re.compile(r"[\s,]*").match(buffer, place)
            assert gap
            place = gap.end()
            if buffer[place : place + 1] == "]":
                return
            try:
                text, place = decoder.raw_decode(buffer, place)
            except json.JSONDecodeError:
                if len(buffer) - place > MAX_TEXT_CHARS or not (chunk := more()):
                    raise InputError(f"{file}: the list {key!r} is cut off or damaged.") from None
                buffer, place = buffer[place:] + chunk, 0
                continue
            if not isinstance(text, str):
                raise InputError(f"{file}: the list {key!r} holds more than texts ({text!r:.40}).")
            yield text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
