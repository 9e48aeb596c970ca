import numpy as np
import pyarrow as pa
import pytest

from albef_core.errors import InputError
from pipelines.crawl_rows import count_words, read_rows
from pipelines.crawl_store import read_crawl
from tests.pipelines.small_crawl import key_of, listed, write_small_crawl


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog's  life, re-told", 4),
        ("", 0),
        (" \t\u00a0\u3000", 0),
        ("\u732b\u304c\u5bdd\u3066\u3044\u308b", 6),
        ("\u041a\u043e\u0442 \u0441\u043f\u0438\u0442", 2),
        ("cat\u732b", 2),
        ("\U0001f600 !", 2),
    ],
)
def test_words_are_counted_as_a_reader_would(text, words):
    assert count_words(pa.array([text])).tolist() == [words]


def test_rows_come_in_list_order_whatever_their_partition(tmp_path):
    rows = [listed(number) for number in (5, 1, 4, 0)]
    rows += [listed(2, list="birds", url="http://host9.example/b")]
    crawl = write_small_crawl(tmp_path, rows, lists=["birds", "cats"], num_partitions=3)

    found = read_rows(crawl)

    assert found.pictures["row"].to_pylist() == [2, 0, 1, 4, 5]
    assert found.captions["caption"].to_pylist() == [
        f"a picture with number {number}" for number in (2, 0, 1, 4, 5)
    ]
    assert found.captions["picture"].to_pylist() == [0, 1, 2, 3, 4]
    ids = found.image_ids(np.array([0, 1]))
    assert ids.to_pylist() == [
        f"birds:{key_of('http://host9.example/b').hex()}",
        f"cats:{key_of('http://host0.example/0.jpg').hex()}",
    ]


def test_a_duplicate_adds_its_caption_where_the_first_has_a_picture_and_else_none(tmp_path):
    lost = "http://host1.example/lost"
    rows = [
        listed(0),
        listed(1, url=lost, state="failed", failure="http 404"),
        listed(2, url=lost, state="duplicate"),
        listed(3, url=listed(0)["url"], state="duplicate", caption="said later"),
    ]
    crawl = write_small_crawl(tmp_path, rows)

    found = read_rows(crawl)

    assert found.captions["caption"].to_pylist() == ["a picture with number 0", "said later"]
    assert found.captions["picture"].to_pylist() == [0, 0]
    assert found.counts.states == {"ok": 1, "failed": 1, "duplicate": 2}
    assert found.counts.hosts == {"host1.example": 1}


def test_of_the_hosts_the_worst_twenty_are_kept(tmp_path):
    rows = [
        listed(100 * host + n, url=f"http://h{host:02d}/{n}", state="failed", failure="dns")
        for host in range(25)
        for n in range(host + 1)
    ]
    crawl = write_small_crawl(tmp_path, rows, num_partitions=4)

    counts = read_rows(crawl).counts

    assert list(counts.hosts.items()) == [(f"h{host:02d}", host + 1) for host in range(24, 4, -1)]
    assert counts.failures == {"dns": 325}


@pytest.mark.parametrize("body", [None, b"PAR1 and no more"], ids=["absent", "damaged"])
def test_a_ledger_that_cannot_be_read_is_named(tmp_path, body):
    write_small_crawl(tmp_path, [listed(0)])
    crawl = read_crawl(tmp_path)
    crawl.ledger(1).unlink()
    if body:
        crawl.ledger(1).write_bytes(body)

    with pytest.raises(InputError, match=r"part-0001\.parquet: .* Take it from a copy"):
        read_rows(crawl)
