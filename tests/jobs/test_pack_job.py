import sys
from pathlib import Path

import ingest as ingest_job
import pack as pack_job
import pytest

from pipelines.manifest import read_manifest
from tests.pipelines.small_crawl import listed, write_small_crawl


@pytest.mark.cluster
def test_a_crawl_goes_to_a_corpus_to_tars_and_back(local_ray, tmp_path, monkeypatch, capsys):
    rows = [listed(number) for number in range(5)]
    rows.append(listed(5, state="failed", failure="dns"))
    write_small_crawl(tmp_path / "crawl", rows)

    def job(main, command: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command.split())
        main()
        return " ".join(capsys.readouterr().out.split())

    built = job(ingest_job.main, "ingest.py --source crawl --out corpus --experiment= --min-side 9")
    packed = job(pack_job.main, "pack.py --corpus corpus --out tars")
    job(ingest_job.main, "ingest.py --source tars/*.tar --out again")

    assert "left out: state `failed` │ 1 of 6 rows" in built
    assert "python jobs/ingest.py --source 'tars/*.tar'" in packed
    before = read_manifest(Path("corpus"))
    assert read_manifest(tmp_path / "again").content_id == before.content_id
