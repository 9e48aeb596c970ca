import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from albef_core.errors import InputError, Preempted
from pipelines.crawl import crawl
from pipelines.crawl_config import CrawlConfig
from tests.pipelines.crawl_server import CrawlServer, crawl_server
from tests.pipelines.test_fetcher import FAST

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[CrawlServer]:
    with crawl_server() as running:
        yield running


def write_list(path: Path, urls: list[str]) -> Path:
    path.write_text("".join(f"caption {n}\t{url}\n" for n, url in enumerate(urls)))
    return path


def config(out: Path, *sources: Path, **options: Any) -> CrawlConfig:
    values = {**FAST, "track": False, "actor_cpus": 1, "num_partitions": 3, **options}
    return CrawlConfig(out=out, source=tuple(map(str, sources)), **values)


def ledger(out: Path) -> list[dict[str, Any]]:
    return ds.dataset(out / "ledger", format="parquet").to_table().sort_by("row").to_pylist()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_crawl_ends_with_every_row_and_its_report_and_knows_what_is_done(
    local_ray: None, server: CrawlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    hosts = [f"127.0.0.{n}" for n in range(1, 9)]
    urls = [server.url(f"good/{n}.jpg", host=host) for n in range(10) for host in hosts]
    urls += [server.url("status/404"), server.url("status/500"), urls[0], "no url"]
    listed, out = write_list(tmp_path / "cc3m_val.tsv", urls), tmp_path / "crawl"

    result = crawl(config(out, listed, track=True))
    server.counts.clear()
    again = crawl(config(out, listed, num_partitions=None))

    states = {"ok": 80, "failed": 3, "refused": 0, "duplicate": 1, "pending": 0}
    assert result.report.states == states
    assert result.report.failures == {"http 404": 1, "http 500": 1, "malformed row": 1}
    assert result.report.num_fetched == 82
    assert result.run_id
    assert (again.report.states, again.report.lists) == (states, {"cc3m": 84})
    assert not server.counts
    body = json.loads((out / "report" / "report.json").read_text())
    assert body["states"] == again.report.states
    for name in ("report.md", "report.html"):
        text = (out / "report" / name).read_text()
        assert "http 404" in text
        assert "127.0.0.1:" in text
    with pytest.raises(InputError, match=r"--image-size 99: .* was begun with 256"):
        crawl(config(out, image_size=99))
    with pytest.raises(InputError, match=r"--num-partitions 9: .* has 3"):
        crawl(config(out, num_partitions=9))


SLOW = {"connections_per_host": 1, "host_interval_s": 0.02, "commit_rows": 5, "num_partitions": 2}


def wait_for_a_commit(out: Path, *, is_there: bool = True) -> None:
    deadline = time.monotonic() + 60
    while bool(list(out.glob("journal/*/*.parquet"))) != is_there:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_a_job(out: Path, source: Path) -> None:
    command = [sys.executable, "jobs/crawl.py", "--source", str(source), "--out", str(out)]
    command += ["--allow-private-hosts", "--no-track", "--actor-cpus", "1"]
    for name, value in SLOW.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_a_commit(out)
    job.kill()
    job.wait()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_crawl_that_is_killed_or_stopped_goes_on_and_stores_nothing_twice(
    joined_ray: None, server: CrawlServer, tmp_path: Path
) -> None:
    hosts = [f"127.0.0.{n}" for n in range(1, 5)]
    urls = [server.url(f"good/{n}.jpg", host=host) for n in range(90) for host in hosts]
    listed, out = write_list(tmp_path / "list.tsv", urls), tmp_path / "crawl"

    def stop() -> None:
        wait_for_a_commit(out, is_there=False)  # that of the killed job has joined the ledger
        wait_for_a_commit(out)
        os.kill(os.getpid(), signal.SIGTERM)

    kill_a_job(out, listed)
    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Preempted, match="The same command goes on"):
        crawl(config(out, listed, **SLOW))
    stopper.join()
    num_stopped = [row["state"] for row in ledger(out)].count("ok")
    crawl(config(out, listed, num_partitions=None))

    assert 0 < num_stopped < len(urls)
    assert {row["state"] for row in ledger(out)} == {"ok"}
    stored = ds.dataset(out / "pictures", format="parquet").to_table(columns=["key"])
    assert stored.num_rows == len(set(stored["key"].to_pylist())) == len(urls)


def test_a_command_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.tsv", ["http://a.example/1.jpg"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")

    with pytest.raises(InputError, match="--contact is missing"):
        CrawlConfig(out=tmp_path / "c", source=(str(listed),))
    with pytest.raises(InputError, match="--source is missing"):
        crawl(config(tmp_path / "c"))
    with pytest.raises(InputError, match="holds thesis"):
        crawl(config(tmp_path / "full", listed))
    with pytest.raises(InputError, match="--retry 'dsn': no such class"):
        crawl(config(tmp_path / "c", listed, retry=("dsn",)))
    assert not (tmp_path / "c" / "crawl.json").exists()
