import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from albef_core.errors import InputError
from pipelines.crawl_ingest import ingest_crawl
from pipelines.crawl_store import is_crawl
from pipelines.ingest_config import CleaningConfig, IngestConfig
from pipelines.ingest_report import IngestReport
from pipelines.manifest import Manifest, read_manifest, read_rows
from pipelines.sources import list_records
from tests.conftest import write_corpus
from tests.pipelines.small_crawl import jpeg, key_of, listed, photo, write_small_crawl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


def build(crawl: Path, out: Path, *, experiment: str = "", **cleaning) -> IngestReport:
    config = IngestConfig(
        source=str(crawl),
        out=out,
        rows_per_shard=64,
        rows_per_group=16,
        cleaning=CleaningConfig(**cleaning),
        experiment=experiment,
    )
    return ingest_crawl(config, on_progress=lambda _done, _total: None)


def captions_of(manifest: Manifest) -> dict[str, list[str]]:
    return dict(read_rows(manifest, ["image_id", "captions"]))


def image_id(url: str, name: str = "cats") -> str:
    return f"{name}:{key_of(url).hex()}"


def left_out(report: IngestReport) -> dict[str, int]:
    assert report.cleaning
    return {row.name: row.num_removed for row in report.cleaning.funnel if row.num_removed}


@pytest.fixture(scope="module")
def messy(tmp_path_factory, local_ray):
    """A crawl with one of everything that can happen to a row, and the corpus made from it."""
    folder = tmp_path_factory.mktemp("messy")
    here = "http://host1.example"
    rows = [listed(number) for number in range(150)]
    rows += [
        listed(150, state="failed", failure="dns", detail="no such name"),
        listed(151, state="refused", failure="robots"),
        listed(152, state="pending"),
        listed(153, state="duplicate", url=rows[4]["url"], caption="the fourth once more"),
        listed(154, state="duplicate", url=rows[4]["url"], caption=rows[4]["caption"]),
        listed(155, url=f"{here}/a", image=rows[7]["image"], caption="the same bytes as seven"),
        listed(156, url=f"{here}/b", image=jpeg(photo(8), 60), caption="eight, encoded again"),
        listed(157, url=f"{here}/c", original_width=199),
        listed(158, url=f"{here}/d", original_width=1500),
        listed(159, url=f"{here}/e", caption=" \u00a0\n"),
        listed(160, url=f"{here}/f", caption="two words"),
        listed(161, url=f"{here}/g", caption="word " * 257),
        listed(
            162,
            url=f"{here}/h",
            caption="\u732b\u304c\u5bdd\u3066\u3044\u308b re\u0301al  \U0001f600",
        ),
        listed(0, list="dogs", url=f"{here}/i", image=jpeg(photo(500)), caption="of another list"),
    ]
    write_small_crawl(folder / "crawl", rows, lists=["cats", "dogs"])
    return folder, build(folder / "crawl", folder / "corpus")


def test_every_row_that_is_not_in_the_corpus_is_accounted_for(messy):
    _folder, report = messy

    assert left_out(report) == {
        "state `duplicate`": 2,
        "state `failed`": 1,
        "state `pending`": 1,
        "state `refused`": 1,
        "empty caption": 1,
        "caption that its picture has already": 1,
        "fewer than 3 words": 1,
        "more than 256 words": 1,
        "smaller than 200 pixels": 1,
        "longer than 3 to 1": 1,
        "no caption left": 3,
        "exact duplicate": 1,
        "near duplicate": 1,
        "said of pictures left out": 3,
    }
    assert report.cleaning
    assert [(row.what, row.num_left) for row in report.cleaning.funnel[-2:]] == [
        ("pictures", 152),
        ("captions", 154),
    ]
    assert (report.num_images, report.num_captions) == (152, 154)
    assert report.sources == {"cats": 151, "dogs": 1}


def test_a_picture_has_the_captions_of_its_url_and_of_its_bytes_in_list_order(messy):
    folder, _report = messy

    captions = captions_of(read_manifest(folder / "corpus"))

    assert captions[image_id("http://host1.example/4.jpg")] == [
        "a picture with number 4",
        "the fourth once more",
    ]
    assert captions[image_id("http://host1.example/7.jpg")] == [
        "a picture with number 7",
        "the same bytes as seven",
    ]
    assert captions[image_id("http://host2.example/8.jpg")] == ["a picture with number 8"]
    assert captions[image_id("http://host1.example/h")] == [
        "\u732b\u304c\u5bdd\u3066\u3044\u308b r\u00e9al  \U0001f600"
    ]
    assert captions[image_id("http://host1.example/i", "dogs")] == ["of another list"]


def test_rows_are_those_of_the_store_mixed_and_in_even_shards(messy):
    folder, _report = messy
    manifest = read_manifest(folder / "corpus")
    rows = list(read_rows(manifest, ["image_id", "image", "url", "sha256", "width", "height"]))

    by_id = {row[0]: row for row in rows}
    for number in range(150):
        url = f"http://host{number % 3}.example/{number}.jpg"
        found = by_id[image_id(url)]
        assert (found[1], found[2]) == (jpeg(photo(number)), url)
    assert [shard.rows for shard in manifest.shards] == [48, 48, 56]
    assert [row[0] for row in rows] != sorted(row[0] for row in rows)
    assert not (folder / "corpus" / "plan.parquet").exists()


def test_what_was_removed_is_listed_with_the_reason_and_the_picture_that_stayed(messy):
    folder, _report = messy

    removed = pq.read_table(folder / "corpus" / "report" / "removed.parquet").to_pylist()

    found = {row["url"].rpartition("/")[2]: (row["reason"], row["pair"]) for row in removed}
    assert found["a"] == ("exact duplicate", image_id("http://host1.example/7.jpg"))
    assert found["b"] == ("near duplicate", image_id("http://host2.example/8.jpg"))
    assert found["c"] == ("smaller than 200 pixels", None)
    assert len(removed) == 7


def test_the_report_shows_failures_sizes_words_and_pairs(messy):
    folder, _report = messy
    report = folder / "corpus" / "report"

    told = json.loads((report / "report.json").read_text())["cleaning"]
    page = (report / "report.html").read_text()

    assert told["failures"] == {"dns": 1, "robots": 1}
    assert told["hosts"] == {"host0.example": 1, "host1.example": 1}
    assert told["sides"] == {"384 to 511": 152}
    assert told["words"]["4 to 5"] == 152
    assert told["pairs"] == [
        [image_id("http://host1.example/b"), image_id("http://host2.example/8.jpg")]
    ]
    assert "| near duplicate | 1 | pictures | 152 |" in (report / "report.md").read_text()
    assert page.count("is a copy of") == 1


def test_the_content_is_the_same_whatever_the_partitions_and_the_seed(messy, tmp_path):
    _folder, report = messy
    rows = [listed(number) for number in range(40)]
    rows.append(listed(40, url="http://host2.example/again", image=rows[5]["image"]))
    write_small_crawl(tmp_path / "one", rows, num_partitions=1)
    write_small_crawl(tmp_path / "many", list(reversed(rows)), num_partitions=5)

    one = build(tmp_path / "one", tmp_path / "a", min_side=0)
    many = build(tmp_path / "many", tmp_path / "b", min_side=0)

    assert one.content_id == many.content_id != report.content_id
    assert one.num_images == 40


def test_each_step_can_be_turned_off(messy, tmp_path):
    folder, _report = messy

    report = build(
        folder / "crawl",
        tmp_path / "out",
        min_side=0,
        max_aspect=0,
        min_words=0,
        max_words=0,
        exact_duplicates=False,
        near_radius=-1,
    )

    assert left_out(report).keys() == {
        "state `duplicate`",
        "state `failed`",
        "state `pending`",
        "state `refused`",
        "empty caption",
        "caption that its picture has already",
        "no caption left",
    }
    assert report.num_images == 158


def test_captions_of_too_many_pictures_go(tmp_path):
    rows = [
        listed(n, caption="a very common caption" if n < 4 else f"one of {n}") for n in range(9)
    ]
    write_small_crawl(tmp_path / "crawl", rows)

    report = build(tmp_path / "crawl", tmp_path / "out", max_repeats=3)

    assert left_out(report) == {"caption of more than 3 pictures": 4, "no caption left": 4}


def test_pictures_of_an_excluded_corpus_are_found_by_whatever_gives_them_away(tmp_path):
    rows = [listed(number) for number in range(30)]
    write_small_crawl(tmp_path / "crawl", rows)
    build(tmp_path / "crawl", tmp_path / "all")
    whole = dict((row["image_id"], row) for row in _corpus_rows(tmp_path / "all"))

    def take(number: int, **changes) -> dict:
        return whole[image_id(rows[number]["url"])] | changes

    other = {"sha256": b"x" * 32, "phash": 0, "url": None, "image": jpeg(photo(900))}
    seen_again = jpeg(photo(4), 55)
    held_out = [
        take(0, **other),
        take(1, **other | {"image_id": f"renamed:{key_of(rows[1]['url']).hex()}"}),
        take(2, **other | {"image_id": "b", "url": rows[2]["url"]}),
        take(3, **other | {"image_id": "c", "sha256": whole[image_id(rows[3]["url"])]["sha256"]}),
        take(4, **other | {"image_id": "d", "image": seen_again, "phash": take(4)["phash"] ^ 3}),
        take(5, **other | {"image_id": "e", "phash": take(5)["phash"]}),
    ]
    write_corpus(tmp_path / "val", held_out, rows_per_shard=4, rows_per_group=2)

    report = build(tmp_path / "crawl", tmp_path / "out", exclude_corpus=(tmp_path / "val",))

    removed = pq.read_table(tmp_path / "out" / "report" / "removed.parquet").to_pylist()
    where = f"in {tmp_path / 'val'} by "
    assert {
        row["image_id"]: (row["reason"].removeprefix(where), row["pair"]) for row in removed
    } == {
        image_id(rows[0]["url"]): ("image id", held_out[0]["image_id"]),
        image_id(rows[1]["url"]): ("key of its URL", held_out[1]["image_id"]),
        image_id(rows[2]["url"]): ("URL", "b"),
        image_id(rows[3]["url"]): ("SHA-256", "c"),
        image_id(rows[4]["url"]): ("look", "d"),
    }
    assert {row["corpus"] for row in removed} == {str(tmp_path / "val")}
    assert report.num_images == 25


def _corpus_rows(folder: Path) -> list[dict]:
    manifest = read_manifest(folder)
    files = [folder / "shards" / shard.name for shard in manifest.shards]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_pictures_that_the_store_lost_are_counted_and_the_others_kept(tmp_path):
    rows = [listed(number) for number in range(80)]
    crawl = write_small_crawl(tmp_path / "crawl", rows)
    store = crawl.pictures("part-0000-000000.parquet")
    table = pq.read_table(store)
    images = table["image"].to_pylist()
    images[3] = images[4]
    changed = table.set_column(1, table.schema.field("image"), [images])
    pq.write_table(changed.slice(0, len(table) - 5), store, row_group_size=32)

    report = build(tmp_path / "crawl", tmp_path / "out")

    assert report.bad_counts == {
        "unreadable file": 5,
        "picture is not the one in the ledger": 1,
    }
    assert report.num_images == read_manifest(tmp_path / "out").num_images == 74

    store.unlink()
    with pytest.raises(InputError, match=r"--max-bad-share 0\.5 allows"):
        build(tmp_path / "crawl", tmp_path / "none")


def test_a_crawl_of_which_nothing_is_left_says_which_step_took_it(tmp_path):
    write_small_crawl(tmp_path / "crawl", [listed(1), listed(2, state="failed", failure="dns")])

    with pytest.raises(InputError, match="cleaning leaves no picture"):
        build(tmp_path / "crawl", tmp_path / "out", min_side=481)

    assert "smaller than 481 pixels | 1" in (tmp_path / "out/report/report.md").read_text()


def test_a_crawl_that_has_not_ended_is_refused(tmp_path):
    crawl = write_small_crawl(tmp_path / "crawl", [listed(1)])
    crawl.journal(1).mkdir(parents=True)
    (crawl.journal(1) / "000000.parquet").write_bytes(b"")

    with pytest.raises(InputError, match="is being crawled, or its crawl was killed"):
        build(tmp_path / "crawl", tmp_path / "out")


def test_flags_that_mean_nothing_here_are_refused(tmp_path):
    write_small_crawl(tmp_path / "crawl", [listed(1)])
    config = IngestConfig(source=str(tmp_path / "crawl"), out=tmp_path / "out", split="train")

    with pytest.raises(InputError, match="--split does not go with a crawl"):
        ingest_crawl(config, on_progress=print)

    cleaned = IngestConfig(
        source="shapes", out=tmp_path / "out", cleaning=CleaningConfig(min_side=100)
    )
    with pytest.raises(InputError, match=r"cleaning is for crawls.*--min-side"):
        list_records(cleaned)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"near_radius": 7}, "--near-radius 7: too many unrelated pictures are that close"),
        ({"leak_radius": 13}, "--leak-radius 13: too many"),
        ({"max_words": 2}, "--max-words 2: is less than --min-words 3"),
    ],
)
def test_cleaning_that_would_take_what_it_should_not_is_refused(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        CleaningConfig(**flags)


def test_the_run_in_mlflow_is_named_by_the_manifest_and_holds_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_small_crawl(tmp_path / "crawl", [listed(1), listed(2, state="failed", failure="dns")])

    report = build(tmp_path / "crawl", tmp_path / "out", experiment="albef-ingest")

    settings = read_manifest(tmp_path / "out").settings
    client = MlflowClient(settings["tracking_uri"])
    run = client.get_run(settings["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["corpus.id"] == report.content_id
    assert run.data.metrics["ingest/failures/dns"] == 1
    assert run.data.metrics["ingest/images"] == 1
    files = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert "report/report.html" in files


def test_a_corpus_is_built_when_mlflow_is_away(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    write_small_crawl(tmp_path / "crawl", [listed(1)])

    with caplog.at_level(logging.WARNING):
        report = build(tmp_path / "crawl", tmp_path / "out", experiment="albef-ingest")

    assert report.num_images == 1
    assert "MLflow has no run of this ingest" in caplog.text
    assert "run_id" not in read_manifest(tmp_path / "out").settings


def test_a_crawl_is_told_by_its_folder(tmp_path):
    write_small_crawl(tmp_path / "crawl", [listed(1)])

    assert is_crawl(str(tmp_path / "crawl"))
    assert not is_crawl(str(tmp_path))
    assert not is_crawl("shapes")
