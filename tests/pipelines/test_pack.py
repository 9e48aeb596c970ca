import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from albef_core.errors import InputError
from pipelines.ingest import ingest
from pipelines.ingest_config import IngestConfig, PackConfig
from pipelines.manifest import Manifest, read_manifest, read_rows
from pipelines.pack import PackResult, pack
from tests.conftest import picture_row, write_corpus
from tests.pipelines.ingest_sources import encoded, picture

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]
KEPT = ["image_id", "image", "captions", "url", "split", "annotations", "width", "height"]


def row(number: int, **changes) -> dict:
    return picture_row(number) | {"image_id": f"cats:{number}", "source": "cats"} | changes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Manifest:
    """Pictures of every format, with several captions, URLs, splits and annotations."""
    rows = [row(number) for number in range(9)]
    rows[1]["image"] = encoded(Image.new("RGB", (40, 40)), "PNG")
    rows[2]["image"] = encoded(picture(2, (40, 40)), "WEBP", lossless=True)
    rows[3] |= {"url": "http://example.org/\u00e9?a=b", "split": "val"}
    rows[4] |= {"captions": ["  kept\n as it is ", "\u732b \U0001f600", "third"]}
    rows[5] |= {"captions": [], "annotations": json.dumps({"questions": [_question()]})}
    return write_corpus(
        tmp_path_factory.mktemp("corpus"), _hashed(rows), rows_per_shard=4, rows_per_group=2
    )


def _question() -> dict:
    return {"question": "How many?", "answers": ["two"], "id": "q1"}


def _hashed(rows: list[dict]) -> list[dict]:
    from hashlib import sha256

    return [one | {"sha256": sha256(one["image"]).digest()} for one in rows]


def packed(corpus: Manifest, out: Path) -> PackResult:
    config = PackConfig(corpus=corpus.folder, out=out)
    return pack(config, on_progress=lambda _done, _total: None)


def test_there_and_back_keeps_pictures_captions_ids_and_with_them_the_content_id(corpus, tmp_path):
    result = packed(corpus, tmp_path / "tars")

    ingest(IngestConfig(source=str(tmp_path / "tars" / "*.tar"), out=tmp_path / "again"))

    again = read_manifest(tmp_path / "again")
    assert again.content_id == corpus.content_id == result.content_id
    assert sorted(read_rows(again, KEPT)) == sorted(read_rows(corpus, KEPT))


def test_other_tools_find_picture_text_and_json_of_one_key(corpus, tmp_path):
    result = packed(corpus, tmp_path)

    assert (result.num_tars, result.num_images) == (3, 9)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        names = tar.getnames()
        told = json.loads(tar.extractfile("00000000003.json").read())
        text = tar.extractfile("00000000000.txt").read().decode()
    assert names[:5] == [
        "00000000000.jpg",
        "00000000000.txt",
        "00000000000.json",
        "00000000001.png",
        "00000000001.txt",
    ]
    assert text == picture_row(0)["captions"][0]
    assert told["caption"] == told["captions"][0] == picture_row(3)["captions"][0]
    assert (told["url"], told["image_id"]) == ("http://example.org/\u00e9?a=b", "cats:3")


def test_a_pack_that_was_cut_short_adds_what_is_missing(corpus, tmp_path):
    packed(corpus, tmp_path)
    bodies = {tar.name: tar.read_bytes() for tar in tmp_path.glob("*.tar")}
    first = (tmp_path / "00000.tar").stat()
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00002.tar.123.tmp").write_bytes(b"half")

    packed(corpus, tmp_path)

    assert {tar.name: tar.read_bytes() for tar in tmp_path.glob("*.tar")} == bodies
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert not list(tmp_path.glob("*.tmp"))


def test_tars_of_another_corpus_are_never_mixed_in(corpus, tmp_path):
    packed(corpus, tmp_path / "tars")
    other = write_corpus(tmp_path / "other", [row(77)], rows_per_shard=4, rows_per_group=2)

    with pytest.raises(InputError, match="has tars of another corpus"):
        packed(other, tmp_path / "tars")

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="has tars already"):
        packed(other, tmp_path / "foreign")
