import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.crawl_config import CrawlConfig
from pipelines.crawl_progress import Progress
from pipelines.crawl_store import Crawl
from pipelines.fetcher import Connections, PartitionCrawl
from tests.pipelines.crawl_server import CrawlServer, crawl_server, jpeg
from tests.pipelines.small_crawl import listed_crawl

FAST = {
    "backoff_s": 0.02,
    "max_bytes": 500_000,
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
    return listed_crawl(folder / "crawl", path)


def fetch(crawl: Crawl, *, stop_after: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Run the only partition; give its ledger by row."""
    config = CrawlConfig(out=crawl.folder, **{**FAST, **options})
    told = []

    async def report(progress: Progress) -> bool:
        told.append(progress)
        return stop_after is not None and sum(p.ended.total() for p in told) >= stop_after

    with ThreadPoolExecutor(2) as executor:
        work = PartitionCrawl(crawl, 0, config, report, Connections(config.connections))
        asyncio.run(work.run(executor))
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

    rows = fetch(listed(tmp_path, list(expected)), first_byte_timeout_s=1.0, transfer_timeout_s=1.5)

    found = {row["url"]: (row["state"], row["failure"]) for row in rows}
    assert found == expected
    assert server.counts["/heals"] == 3
    assert server.counts["/status/404"] == 1
    assert server.counts["/status/500"] == 3
    assert server.counts["/good/1.jpg"] == 1


def test_pictures_are_stored_as_the_ledger_says(server: CrawlServer, tmp_path: Path) -> None:
    crawl = listed(tmp_path, [server.url(f"good/{n}.jpg") for n in range(70)])

    rows = fetch(crawl, commit_rows=30, image_size=128)

    for row in rows:
        stored = picture_of(crawl, row)
        names = ("key", "sha256", "phash", "width", "height")
        assert {name: stored[name] for name in names} == {name: row[name] for name in names}
        assert (row["original_width"], row["original_height"]) == (500, 375)
        assert (row["width"], row["height"]) == (171, 128)
        assert (row["attempts"], row["http_status"]) == (1, 200)
        assert row["first_at"] <= row["last_at"]
    assert rows[5]["num_bytes"] == len(jpeg(5))
    shard = pq.ParquetFile(crawl.pictures(rows[0]["shard"]))
    assert shard.metadata.row_group(0).num_rows <= 32
    assert len({row["shard"] for row in rows}) > 1


def test_a_stopped_run_goes_on_where_it_was(
    server: CrawlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.fetcher.SECONDS_BETWEEN_REPORTS", 0.01)
    crawl = listed(tmp_path, [server.url(f"good/{n}.jpg") for n in range(60)])
    options = {"commit_rows": 5, "connections": 2}

    states = [row["state"] for row in fetch(crawl, stop_after=10, **options)]
    done = fetch(crawl, **options)

    assert states.count("ok") >= 10
    assert states.count("pending") >= 1
    assert [row["state"] for row in done] == ["ok"] * 60
    stored = [pq.read_table(file) for file in (crawl.folder / "pictures").iterdir()]
    keys = pa.concat_tables(stored)["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 60
    fetched_twice = {path for path, count in server.counts.items() if count > 1}
    assert len(fetched_twice - {"/robots.txt"}) <= 4  # what was under way


def test_retry_fetches_only_what_is_asked_for(server: CrawlServer, tmp_path: Path) -> None:
    paths = ["good/1.jpg", "status/404", "status/500", "heals", "header/tdm-reservation/1"]
    crawl = listed(tmp_path, [server.url(path) for path in paths])
    fetch(crawl, retries=0)
    server.counts.clear()

    again = fetch(crawl, retry=("transient",), retries=3)
    after_transient = dict(server.counts)
    fetch(crawl)
    fetch(crawl, retry=("http 404",), retries=0)

    assert set(after_transient) == {"/status/500", "/heals", "/robots.txt"}
    assert [row["state"] for row in again] == ["ok", "failed", "failed", "ok", "refused"]
    assert [row["attempts"] for row in again] == [1, 1, 5, 4, 1]
    assert set(server.counts) - set(after_transient) == {"/status/404"}
    assert ledger(crawl)[1]["attempts"] == 2


def test_headers_say_who_asks(server: CrawlServer, tmp_path: Path) -> None:
    crawl = listed(tmp_path, [server.url("good/1.jpg")])

    fetch(crawl, contact="https://example.org/crawler")

    agents = {headers["User-Agent"] for headers in server.headers}
    assert len(agents) == 1
    assert agents.pop().startswith("albef-crawler/")
    assert server.headers[0]["User-Agent"].endswith("(+https://example.org/crawler)")
    assert all("Cookie" not in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("robots", "state", "failure"),
    [
        ("User-agent: *\nDisallow: /good/", "refused", "robots"),
        ("User-agent: albef-crawler\nDisallow: /", "refused", "robots"),
        ("User-agent: other\nDisallow: /", "ok", None),
        ("", "ok", None),
        (404, "ok", None),
        (403, "ok", None),
        (503, "refused", "robots unreachable"),
    ],
)
def test_robots_txt_is_obeyed(
    robots: str | int, state: str, failure: str | None, server: CrawlServer, tmp_path: Path
) -> None:
    server.robots = robots
    crawl = listed(tmp_path, [server.url(f"good/{n}.jpg") for n in range(6)])

    rows = fetch(crawl)

    assert {(row["state"], row["failure"]) for row in rows} == {(state, failure)}
    if robots != 503:
        assert server.counts["/robots.txt"] == 1


def test_robots_txt_can_be_left_out(server: CrawlServer, tmp_path: Path) -> None:
    server.robots = "User-agent: *\nDisallow: /"

    rows = fetch(listed(tmp_path, [server.url("good/1.jpg")]), obey_robots=False)

    assert rows[0]["state"] == "ok"
    assert server.counts["/robots.txt"] == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_never_connected_to(
    host: str, server: CrawlServer, tmp_path: Path
) -> None:
    crawl = listed(tmp_path, [server.url("good/1.jpg", host=host)])

    rows = fetch(crawl, allow_private_hosts=False, contact="me@example.org", retries=0)

    assert (rows[0]["state"], rows[0]["failure"]) == ("refused", "private address")
    assert not server.counts


def test_slow_urls_do_not_hold_up_others(server: CrawlServer, tmp_path: Path) -> None:
    slow = [server.url(f"never/{n}", host="127.0.0.2") for n in range(4)]
    good = [server.url(f"good/{n}.jpg", host="127.0.0.3") for n in range(40)]
    crawl = listed(tmp_path, slow + good)

    rows = fetch(crawl, connections_per_host=2, retries=0, commit_rows=10, first_byte_timeout_s=1.0)

    last_good = max(row["last_at"] for row in rows[4:])
    last_slow = max(row["last_at"] for row in rows[:4])
    assert {row["failure"] for row in rows[:4]} == {"timeout first byte"}
    assert last_good < last_slow


def test_rows_beyond_the_window_are_fetched_too(
    server: CrawlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.fetcher.WINDOW_ROWS", 8)
    monkeypatch.setattr("pipelines.fetcher.FOLD_ROWS", 10)

    rows = fetch(listed(tmp_path, [server.url(f"status/404?{n}") for n in range(50)]))

    assert {row["failure"] for row in rows} == {"http 404"}
    assert server.counts["/status/404"] == 50
