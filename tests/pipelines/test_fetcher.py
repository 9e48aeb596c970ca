import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.crawl_config import CrawlConfig
from pipelines.crawl_listing import add_lists
from pipelines.crawl_store import VERSION, Crawl
from pipelines.fetcher import PartitionCrawl, Progress
from pipelines.url_lists import find_list
from tests.pipelines.crawl_server import CrawlServer, crawl_server, jpeg

FAST = {
    "connect_timeout_s": 2.0,
    "first_byte_timeout_s": 0.4,
    "transfer_timeout_s": 0.8,
    "backoff_s": 0.02,
    "max_bytes": 2_000_000,
    "allow_private_hosts": True,
    "commit_s": 0.5,
    "connections_per_host": 16,
}


@pytest.fixture(scope="module")
def running() -> Iterator[CrawlServer]:
    with crawl_server() as server:
        yield server


@pytest.fixture
def server(running: CrawlServer) -> CrawlServer:
    running.counts.clear()
    running.headers.clear()
    running.robots = 404
    return running


def listed(folder: Path, urls: list[str], name: str = "list.tsv") -> Crawl:
    """List URLs in a crawl of one partition."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(f"{url}\tcaption {i}\n" for i, url in enumerate(urls)))
    crawl = Crawl(
        version=VERSION,
        num_partitions=1,
        lists=(),
        settings={},
        tool_version="test",
        folder=folder / "crawl",
    )
    return add_lists(crawl, [find_list(str(path))], on_progress=lambda rows: None)


def fetch(crawl: Crawl, *, stop_after: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Run the only partition; give its ledger by row."""
    config = CrawlConfig(out=crawl.folder, **{**FAST, **options})
    told = []

    async def report(progress: Progress) -> bool:
        told.append(progress)
        return stop_after is not None and sum(p.ended.total() for p in told) >= stop_after

    with ThreadPoolExecutor(2) as executor:
        asyncio.run(PartitionCrawl(crawl, 0, config, report).run(executor))
    return ledger(crawl)


def ledger(crawl: Crawl) -> list[dict[str, Any]]:
    return pq.read_table(crawl.ledger(0)).sort_by("row").to_pylist()


def picture_of(crawl: Crawl, row: dict[str, Any]) -> dict[str, Any]:
    return pq.read_table(crawl.pictures(row["shard"])).slice(row["shard_row"], 1).to_pylist()[0]


def test_every_fault_ends_in_its_class(server: CrawlServer, tmp_path: Path) -> None:
    closed = "http://127.0.0.9:9/x.jpg"
    expected = {
        server.url("good/1.jpg"): ("ok", None),
        server.url("gzipped"): ("ok", None),
        server.url("heals"): ("ok", None),
        server.url("busy/0"): ("ok", None),
        server.url("status/404"): ("failed", "http 404"),
        server.url("status/500"): ("failed", "http 500"),
        server.url("html"): ("failed", "not an image"),
        server.url("truncated"): ("failed", "corrupt"),
        server.url("endless"): ("failed", "too large"),
        server.url("bomb"): ("failed", "too large"),
        server.url("drip"): ("failed", "timeout transfer"),
        server.url("never"): ("failed", "timeout first byte"),
        server.url("reset"): ("failed", "truncated"),
        server.url("loop"): ("failed", "bad redirect"),
        server.url("to?url=/good/2.jpg"): ("ok", None),
        server.url("to?url=file:///etc/passwd"): ("refused", "scheme"),
        server.url("header/X-Robots-Tag/noai"): ("refused", "opt-out"),
        closed: ("failed", "connect"),
        "http://no-such-host.invalid/x.jpg": ("failed", "dns"),
        "ftp://127.0.0.1/x.jpg": ("refused", "scheme"),
        server.url("good/1.jpg#again"): ("duplicate", None),
    }

    rows = fetch(listed(tmp_path, list(expected)))

    found = {row["url"]: (row["state"], row["failure"]) for row in rows}
    assert found == expected
    assert server.counts["/heals"] == 3
    assert server.counts["/status/404"] == 1
    assert server.counts["/status/500"] == 3
    assert server.counts["/good/1.jpg"] == 1
