import gzip
import shutil
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from albef_core.errors import InputError
from pipelines import crawl_listing
from pipelines.crawl_listing import add_lists, choose_partitions, new_lists, settle_listing
from pipelines.crawl_store import VERSION, Crawl, read_crawl, write_crawl
from pipelines.url_lists import UrlList, find_list
from pipelines.urls import partition_of


@pytest.fixture
def crawl(tmp_path: Path) -> Crawl:
    empty = Crawl(
        version=VERSION,
        num_partitions=4,
        lists=(),
        settings={},
        tool_version="test",
        folder=tmp_path / "crawl",
    )
    write_crawl(empty)
    return empty


def url_list(tmp_path: Path, name: str, *urls: str) -> UrlList:
    path = tmp_path / name
    path.write_text("".join(f"{url}\tcaption of {url}\n" for url in urls))
    return find_list(str(path))


def add(crawl: Crawl, *lists: UrlList) -> Crawl:
    return add_lists(crawl, new_lists(crawl, lists), on_progress=lambda rows: None)


def ledger(crawl: Crawl) -> list[dict[str, Any]]:
    table = ds.dataset(crawl.folder / "ledger", format="parquet").to_table()
    rows = table.to_pylist()
    names = [one.name for one in crawl.lists]
    return sorted(rows, key=lambda row: (names.index(row["list"]), row["row"]))


def test_every_row_is_in_its_host_s_partition_and_a_url_is_fetched_once(
    crawl: Crawl, tmp_path: Path
) -> None:
    urls = [f"http://host-{n}.example/{m}.jpg" for n in range(20) for m in range(2)]
    extra = ["http://HOST-3.example:80/1.jpg#x", "nothing", "ftp://host-1.example/1"]

    done = add(crawl, url_list(tmp_path, "a.tsv", *urls, *extra))

    rows = ledger(done)
    assert [row["url"] for row in rows] == urls + extra
    assert [row["caption"] for row in rows] == [f"caption of {url}" for url in urls + extra]
    assert {row["state"] for row in rows[:40]} == {"pending"}
    assert [(row["state"], row["failure"]) for row in rows[40:]] == [
        ("duplicate", None),
        ("failed", "malformed row"),
        ("refused", "scheme"),
    ]
    assert rows[40]["key"] == rows[7]["key"]
    for partition in range(4):
        part = ds.dataset(done.ledger(partition)).to_table().to_pylist()
        assert all(partition_of(row["host"], 4) == partition for row in part)


def test_chunks_change_nothing(
    crawl: Crawl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"http://host-{n % 7}.example/{n % 60}.jpg" for n in range(200)]
    listed = url_list(tmp_path, "a.tsv", *urls)
    whole = ledger(add(crawl, listed))
    shutil.rmtree(crawl.folder)
    monkeypatch.setattr(crawl_listing, "CHUNK_ROWS", 7)

    assert ledger(add(crawl, listed)) == whole


def test_a_list_that_comes_later_is_added_and_earlier_rows_stay_first(
    crawl: Crawl, tmp_path: Path
) -> None:
    first = url_list(tmp_path, "a_1.tsv", "http://a/1", "http://a/2")
    done = add(crawl, first)

    done = add(done, first, url_list(tmp_path, "a_2.tsv", "http://a/2", "http://a/3", "http://a/3"))

    assert [(one.name, one.num_rows) for one in done.lists] == [("a", 2), ("a-2", 3)]
    assert [(row["list"], row["row"], row["state"]) for row in ledger(done)] == [
        ("a", 0, "pending"),
        ("a", 1, "pending"),
        ("a-2", 0, "duplicate"),
        ("a-2", 1, "pending"),
        ("a-2", 2, "duplicate"),
    ]
    assert read_crawl(done.folder).lists == done.lists


def test_a_list_that_changed_is_refused(crawl: Crawl, tmp_path: Path) -> None:
    done = add(crawl, url_list(tmp_path, "a.tsv", "http://a/1"))

    with pytest.raises(InputError, match="when it was listed"):
        new_lists(done, [url_list(tmp_path, "a.tsv", "http://a/1", "http://a/2")])


def test_a_listing_that_was_killed_leaves_nothing(crawl: Crawl, tmp_path: Path) -> None:
    done = add(crawl, url_list(tmp_path, "a.tsv", "http://a/1"))
    before = ledger(done)
    second = url_list(tmp_path, "b.tsv", "http://a/1", "http://b/1")

    def die(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_lists(done, [second], on_progress=die)
    settle_listing(done.folder, len(read_crawl(done.folder).lists))

    assert ledger(done) == before
    assert not list(done.folder.glob("listing-*"))
    assert len(ledger(add(done, second))) == 3


def test_a_listing_that_was_killed_while_its_files_moved_is_ended(
    crawl: Crawl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(staged: Path, folder: Path) -> None:
        next(staged.glob("*.parquet")).replace(tmp_path / "moved")
        raise KeyboardInterrupt

    listed = url_list(tmp_path, "a.tsv", *(f"http://host-{n}/1" for n in range(9)))
    with monkeypatch.context() as patch:
        patch.setattr(crawl_listing, "_move", die)
        with pytest.raises(KeyboardInterrupt):
            add(crawl, listed)
    done = read_crawl(crawl.folder)
    (staged,) = done.folder.glob("listing-*")
    shutil.move(tmp_path / "moved", staged / "part-0000.parquet")

    settle_listing(done.folder, len(done.lists))

    assert len(ledger(done)) == 9
    assert not list(done.folder.glob("listing-*"))


def test_a_damaged_list_is_refused_whole(crawl: Crawl, tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    packed = gzip.compress("".join(f"http://a/{n},{n}\n" for n in range(9000)).encode())
    path.write_bytes(gzip.compress(b"url,text\n") + packed[: len(packed) // 2])

    with pytest.raises(InputError, match=r"a\.csv\.gz: damaged"):
        add(crawl, find_list(str(path)))

    assert read_crawl(crawl.folder).lists == ()


@pytest.mark.parametrize(
    ("num_bytes", "partitions"), [(1000, 4), (1_500_000_000, 500), (10**12, 1024)]
)
def test_the_lists_size_says_how_many_partitions_there_are(
    num_bytes: int, partitions: int, tmp_path: Path
) -> None:
    class Sized(UrlList):
        num_bytes = 0

    one = url_list(tmp_path, "a.tsv", "http://a/1")
    sized = Sized(one.name, one.files, one.read_file)
    Sized.num_bytes = num_bytes  # type: ignore[misc]

    assert choose_partitions([sized]) == partitions
