import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from albef_core.errors import InputError
from pipelines import ledger
from pipelines.crawl_store import Crawl
from pipelines.ledger import Journal, count_wanted, fold, locked, recover, wanted_rows
from tests.pipelines.test_fetcher import listed

URLS = [f"http://a.example/{n}.jpg" for n in range(20)]


def ended(position: int, **told: Any) -> dict[str, Any]:
    row = {"position": position, "state": "ok", "attempts": 1, "first_at": 1000, "last_at": 2000}
    return {**row, **told}


def picture(number: int) -> dict[str, Any]:
    body = bytes([number])
    return {
        "key": body * 16,
        "image": body,
        "sha256": body * 32,
        "phash": 2**64 - 1 - number,
        "width": 1,
        "height": 1,
    }


def read(crawl: Crawl) -> list[dict[str, Any]]:
    return pq.read_table(crawl.ledger(0)).to_pylist()


def test_what_was_committed_is_in_the_ledger_and_the_rest_untouched(tmp_path: Path) -> None:
    crawl = listed(tmp_path, URLS)
    before, journal = read(crawl), Journal(crawl, 0)

    journal.commit([ended(3, shard_row=0, phash=2**64 - 1)], [picture(3)])
    journal.commit([ended(7, state="failed", failure="http 404", http_status=404)], [])
    fold(crawl, 0)

    rows = read(crawl)
    assert rows[3]["state"] == "ok"
    assert rows[3]["phash"] == 2**64 - 1
    assert pq.read_table(crawl.pictures(rows[3]["shard"]))["image"].to_pylist() == [b"\x03"]
    assert (rows[7]["state"], rows[7]["failure"], rows[7]["shard"]) == ("failed", "http 404", None)
    assert [row["url"] for row in rows] == [row["url"] for row in before]
    others = [n for n in range(20) if n not in (3, 7)]
    assert [rows[n] for n in others] == [before[n] for n in others]
    assert not crawl.journal(0).exists()


def test_a_row_that_ended_twice_is_as_it_ended_last(tmp_path: Path) -> None:
    crawl = listed(tmp_path, URLS)
    journal = Journal(crawl, 0)
    journal.commit([ended(3, state="failed", failure="dns")], [])
    journal.commit([ended(3, shard_row=0)], [picture(3)])

    fold(crawl, 0)

    assert (read(crawl)[3]["state"], read(crawl)[3]["failure"]) == ("ok", None)


def test_a_fold_that_was_killed_before_it_cleared_the_journal_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crawl = listed(tmp_path, URLS)
    Journal(crawl, 0).commit([ended(3, shard_row=0)], [picture(3)])
    with monkeypatch.context() as patch:
        patch.setattr(ledger.shutil, "rmtree", lambda folder: None)
        fold(crawl, 0)
    once = read(crawl)

    fold(crawl, 0)

    assert read(crawl) == once
    assert not crawl.journal(0).exists()


def test_pictures_that_no_row_names_are_removed_and_their_name_is_free(tmp_path: Path) -> None:
    crawl = listed(tmp_path, URLS)
    Journal(crawl, 0).commit([ended(3, shard_row=0)], [picture(3)])
    Journal(crawl, 0).commit([ended(4, shard_row=0)], [picture(4)])
    newest = sorted(crawl.journal(0).glob("*.parquet"))[-1]
    newest.unlink()  # killed after the pictures and before the journal
    half = crawl.pictures("part-0000-000009.parquet.77.tmp")
    half.write_bytes(b"half")

    recover(crawl, 0)

    assert [file.name for file in half.parent.iterdir()] == ["part-0000-000001.parquet"]
    assert [row["state"] for row in read(crawl)].count("ok") == 1
    Journal(crawl, 0).commit([ended(4, shard_row=0)], [picture(4)])
    recover(crawl, 0)
    assert read(crawl)[4]["shard"] == "part-0000-000002.parquet"


def test_pieces_of_any_size_give_the_same_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ROWS_PER_LEDGER_GROUP", 3)
    monkeypatch.setattr("pipelines.crawl_listing.ROWS_PER_LEDGER_GROUP", 3)
    crawl = listed(tmp_path, URLS)
    failed = [ended(n, state="failed", failure="dns") for n in (2, 3, 11, 19)]
    Journal(crawl, 0).commit(failed, [])

    fold(crawl, 0)

    rows = read(crawl)
    assert [n for n, row in enumerate(rows) if row["failure"] == "dns"] == [2, 3, 11, 19]
    assert [row.position for row in wanted_rows(crawl.ledger(0), ())] == [
        n for n in range(20) if n not in (2, 3, 11, 19)
    ]


@pytest.mark.parametrize(
    ("retry", "positions"),
    [
        ((), {5}),
        (("transient",), {0, 1, 5}),
        (("dns",), {0, 5}),
        (("http 404",), {2, 5}),
        (("all",), {0, 1, 2, 3, 5}),
    ],
)
def test_a_run_wants_what_is_pending_and_what_is_to_be_tried_again(
    retry: tuple[str, ...], positions: set[int], tmp_path: Path
) -> None:
    crawl = listed(tmp_path, [*URLS[:6], "no url"])
    failures = ["dns", "http 503", "http 404"]
    rows = [ended(n, state="failed", failure=name) for n, name in enumerate(failures)]
    rows += [ended(3, state="refused", failure="robots"), ended(4)]
    Journal(crawl, 0).commit(rows, [])
    fold(crawl, 0)

    assert {row.position for row in wanted_rows(crawl.ledger(0), retry)} == positions
    assert count_wanted(crawl, retry) == {0: len(positions)}


def _hold(path: Path, is_held: Any) -> None:
    with locked(path, wait_s=0):
        is_held.set()
        multiprocessing.Event().wait(30)


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "a.lock", is_held), daemon=True)
    holder.start()
    assert is_held.wait(10)

    with pytest.raises(InputError, match="another process"), locked(tmp_path / "a.lock", wait_s=0):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / "a.lock", wait_s=0):
        pass
