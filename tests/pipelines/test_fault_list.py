import asyncio
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.crawl_config import CrawlConfig
from pipelines.fault_list import FaultList, find_differences, write_list, write_truth
from pipelines.fault_server import FaultServer, ServerOptions, fault_server
from pipelines.faults import FAULTS
from pipelines.fetcher import Connections, PartitionCrawl, Progress
from pipelines.urls import canonical_url
from tests.pipelines.small_crawl import listed_crawl

SIZE, NUM_HOSTS, NUM_ROWS = (128, 96), 12, 260


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server(ServerOptions(num_hosts=NUM_HOSTS, size=SIZE)) as running:
        yield running


@pytest.fixture(scope="module")
def crawled(server: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crawl a list with every fault, in this process; beside it is `truth.parquet`."""
    folder = tmp_path_factory.mktemp("faults")
    rows = FaultList(
        port=server.port,
        num_rows=NUM_ROWS,
        faulty=0.4,
        num_hosts=NUM_HOSTS,
        size=SIZE,
    )
    write_list(rows, folder / "list.tsv")
    write_truth(rows, folder / "truth.parquet")
    crawl = listed_crawl(folder / "crawl", folder / "list.tsv")
    config = CrawlConfig(
        out=crawl.folder,
        allow_private_hosts=True,
        image_size=70,
        connect_timeout_s=2.0,
        first_byte_timeout_s=1.0,
        transfer_timeout_s=2.0,
        backoff_s=0.1,
        commit_rows=50,
    )

    async def go_on(progress: Progress) -> bool:
        return False

    with ThreadPoolExecutor(2) as executor:
        work = PartitionCrawl(crawl, 0, config, go_on, Connections(config.connections))
        asyncio.run(work.run(executor))
    return crawl.folder


def test_every_row_of_a_crawl_is_as_the_truth_says(crawled: Path) -> None:
    truth = pq.read_table(crawled.parent / "truth.parquet").to_pylist()

    assert {row["fault"] for row in truth} >= {f.name for f in FAULTS.values() if f.weight}
    assert find_differences(crawled, crawled.parent / "truth.parquet") == []


def test_what_is_good_was_sent_once_and_what_is_forbidden_was_not_asked_for(
    crawled: Path, server: FaultServer
) -> None:
    for row in pq.read_table(crawled.parent / "truth.parquet").to_pylist():
        path = row["url"].partition("://")[2]
        if row["fault"] in ("picture", "small", "cmyk", "noai-other"):
            assert (server.requests[path], server.served[path]) == (1, 1)
        if (row["failure"] or "").startswith("robots"):
            assert server.requests[path] == 0


def test_duplicates_are_spelled_otherwise_and_mean_the_same(crawled: Path) -> None:
    truth = pq.read_table(crawled.parent / "truth.parquet").to_pylist()
    plain = {row["url"] for row in truth if row["fault"] == "picture"}
    again = [row["url"] for row in truth if row["fault"] == "duplicate"]

    assert again
    assert plain.isdisjoint(again)
    assert {canonical_url(url).text for url in again} <= plain


def spoil(crawled: Path, values: dict[str, object]) -> list[str]:
    """Change the first row of the ledger for now, or drop it; give the differences."""
    path = crawled / "ledger" / "part-0000.parquet"
    whole = path.read_bytes()
    table = pq.read_table(path)
    rows = table.to_pylist()
    (found,) = (one for one in rows if one["row"] == 0)
    found.update(values)
    if not values:
        rows.remove(found)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    try:
        return find_differences(crawled, crawled.parent / "truth.parquet")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, ["row 0: 0 times in the ledger", "no row of the ledger names it"]),
        ({"state": "pending"}, ["is pending, None", "no row of the ledger names it"]),
        ({"attempts": 2}, ["2 attempts"]),
        ({"original_width": 7}, ["the picture was 7 x 96"]),
        ({"sha256": bytes(32)}, ["is not what row 0 says"]),
        ({"shard_row": 9999}, ["its picture is not in the store", "no row of the ledger names it"]),
        ({"row": 9999}, ["row 0: 0 times", "row 9999: was never listed", "no row of the"]),
    ],
)
def test_a_ledger_that_is_wrong_is_found_out(
    crawled: Path, values: dict[str, object], told: list[str]
) -> None:
    differences = spoil(crawled, values)

    assert len(differences) == len(told)
    assert all(any(part in line for line in differences) for part in told)


def test_shares_of_a_list_are_those_that_were_asked_for() -> None:
    rows = FaultList(port=80, num_rows=1000, faulty=0.3, num_hosts=5)

    kinds = Counter(kind for kind, _ in rows.rows())

    assert kinds["picture"] == pytest.approx(700, abs=45)
    assert list(rows.rows()) == list(rows.rows())
