import hashlib
from pathlib import Path

from pipelines.leaks import find_leaks
from tests.conftest import picture_row, write_corpus


def corpus(folder: Path, rows: list[dict]):
    return write_corpus(folder, rows, rows_per_shard=3, rows_per_group=2)


def test_every_picture_that_was_learned_from_is_counted_by_what_gives_it_away(tmp_path):
    learned = corpus(tmp_path / "a", [picture_row(n) for n in range(8)])
    renamed = picture_row(5) | {"image_id": "other-name"}
    encoded_again = picture_row(6) | {
        "image_id": "other-file",
        "sha256": hashlib.sha256(b"again").digest(),
    }
    changed = picture_row(3) | {"sha256": hashlib.sha256(b"x").digest(), "phash": 2**63 + 1}
    held_out = corpus(
        tmp_path / "b", [picture_row(20), renamed, encoded_again, changed, picture_row(0)]
    )

    report = find_leaks(learned, held_out)

    assert report.by_kind == {"image_id": 2, "sha256": 2, "phash": 3}
    assert (report.num_images, report.num_leaked, report.share) == (5, 4, 0.8)
    assert set(report.some_ids) == {"other-name", "other-file", "picture-003", "picture-000"}
    assert report.corpus_id == held_out.content_id


def test_two_corpora_without_a_picture_in_common_leak_nothing(tmp_path):
    learned = corpus(tmp_path / "a", [picture_row(n) for n in range(4)])
    held_out = corpus(tmp_path / "b", [picture_row(n) for n in range(10, 14)])

    report = find_leaks(learned, held_out)

    assert (report.num_leaked, report.some_ids) == (0, ())
    assert report.by_kind == {"image_id": 0, "sha256": 0, "phash": 0}
