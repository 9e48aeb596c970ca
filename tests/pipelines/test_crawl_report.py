import json
from pathlib import Path

from pipelines.crawl_report import make_report, write_crawl_report
from pipelines.ledger import Journal, fold
from tests.pipelines.test_fetcher import listed


def test_failures_are_counted_by_class_and_by_host(tmp_path: Path) -> None:
    urls = [f"http://host-{n % 30}.example/{n}.jpg" for n in range(90)]
    crawl = listed(tmp_path, [*urls, urls[0], "nothing"])
    told = {"attempts": 1, "num_bytes": 1000}
    rows = [
        {"position": n, "state": "failed", "failure": "http 404", **told}
        for n in range(90)
        if n % 30 < 25 and (n < 30 or n % 30 == 7)
    ]
    rows += [{"position": 29, "state": "refused", "failure": "robots", "attempts": 1}]
    Journal(crawl, 0).commit(rows, [])
    fold(crawl, 0)

    report = make_report(crawl, num_fetched=28, cpus=2, seconds=36.0)
    write_crawl_report(report)

    assert report.failures == {"http 404": 27, "malformed row": 1, "robots": 1}
    assert report.states == {"ok": 0, "failed": 28, "refused": 1, "duplicate": 1, "pending": 62}
    assert report.num_bytes == 27_000
    assert next(iter(report.hosts.items())) == ("host-7.example", 3)
    assert len(report.hosts) == 20
    assert report.cpu_hours_per_million == 714.286
    body = json.loads((crawl.folder / "report" / "report.json").read_text())
    assert body["lists"] == {"list": 92}
    assert (
        "| robots | 1 | no | robots.txt forbids it |"
        in (crawl.folder / "report" / "report.md").read_text()
    )
    assert (
        "<td>host-7.example</td><td>3</td>" in (crawl.folder / "report" / "report.html").read_text()
    )
