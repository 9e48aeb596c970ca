import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albef_core.errors import InputError
from pipelines import url_lists
from pipelines.url_lists import ListRow, find_list

A, B = "http://a.example/1.jpg", "https://b.example/2.jpg"


def rows(path: Path | str, **columns: str) -> list[ListRow]:
    return list(find_list(str(path), **columns).rows())


@pytest.mark.parametrize(
    "text", [f"a cat\t{A}\na dog\t{B}\n", f"{A}\ta cat\n{B}\ta dog\n", f"{A}\ta cat\r\n{B}\ta dog"]
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_columns_of_a_tsv_are_told_apart_by_looking(
    text: str, is_packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"cc3m_val.tsv{'.gz' * is_packed}"
    path.write_bytes(gzip.compress(text.encode()) if is_packed else text.encode())

    assert rows(path) == [ListRow(A, "a cat"), ListRow(B, "a dog")]
    assert find_list(str(path)).name == "cc3m"


def test_damaged_lines_are_rows_that_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    lines = [f"{A}\tcat".encode(), b"", b"\tno url", f"{A}\ta\tb".encode(), b"http://a/\xff\tx"]
    path.write_bytes(b"\n".join(lines) + b"\n")

    found = rows(path)

    assert [row.problem for row in found] == [
        "",
        "1 fields, not 2",
        "no URL",
        "3 fields, not 2",
        "not UTF-8",
    ]
    assert found[4].caption == "x"


def test_odd_characters_of_captions_survive(tmp_path: Path) -> None:
    caption = 'a "quoted" \u2028 line, \u732b \x0b\U0001f408'
    (tmp_path / "list.tsv").write_text(f"{A}\t{caption}\n", encoding="utf-8")

    assert rows(tmp_path / "list.tsv") == [ListRow(A, caption)]


def test_sbu_s_two_files_are_read_as_one_list(tmp_path: Path) -> None:
    (tmp_path / "SBU_captioned_photo_dataset_urls.txt").write_text(f"{A}\n{B}\nhttp://c/3.jpg\n")
    (tmp_path / "SBU_captioned_photo_dataset_captions.txt").write_text("a cat\na dog\n")

    found = rows(tmp_path / "SBU_captioned_photo_dataset_urls.txt")

    assert found[:2] == [ListRow(A, "a cat"), ListRow(B, "a dog")]
    assert found[2].problem == "no caption"


def test_urls_without_their_captions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "my_urls.txt").write_text(f"{A}\n")

    with pytest.raises(InputError, match=r"my_captions\.txt is not beside it"):
        find_list(str(tmp_path / "my_urls.txt"))


@given(pairs=st.lists(st.tuples(st.text(), st.text()), max_size=8), chars=st.integers(1, 40))
def test_sbu_s_json_is_streamed_whatever_is_in_its_texts(
    pairs: list[tuple[str, str]], chars: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "sbu.json"
    urls = [f"http://a/{number}?{url}" for number, (url, _caption) in enumerate(pairs)]
    captions = [caption for _url, caption in pairs]
    body = {"user_ids": [1, 2], "captions": captions, "image_urls": urls}
    path.write_text(json.dumps(body), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(url_lists, "CHARS_AT_ONCE", chars)
        found = rows(path)

    assert found == [ListRow(*pair) for pair in zip(urls, captions, strict=True)]


def test_json_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sbu.json").write_text('{"captions": ["a"], "image_urls": ["http://a/1", "http:')

    with pytest.raises(InputError, match="'image_urls' is cut off"):
        rows(tmp_path / "sbu.json")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_named_columns_are_guessed_whatever_their_case(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"laion_10k.{kind}"
    table = {"id": ["1", "2", "3"], "TEXT": ["a, cat", "a\ndog", None], "URL": [A, B, None]}
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        path.write_text(f'id,TEXT,URL\n1,"a, cat",{A}\n2,"a\ndog",{B}\n3,,\n4,only two\n')

    found = rows(path)

    assert found[:2] == [ListRow(A, "a, cat"), ListRow(B, "a\ndog")]
    assert [row.problem for row in found[2:]] == ["no URL", "2 fields, not 3"][: len(found) - 2]
    assert find_list(str(path)).name == "laion-10k"


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"link,words,url\n{A},cat,-\n")

    assert rows(path, url_column="link", caption_column="words") == [ListRow(A, "cat")]
    with pytest.raises(InputError, match=r"no column text or .*only link, words, url\. Name it"):
        find_list(str(path))


def test_a_pattern_is_one_list_of_many_files_in_order(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"part-{number}.tsv").write_text(f"{A}?{number}\tcat\n")

    found = find_list(f"{tmp_path}/part-*.tsv")

    assert [row.url for row in found.rows()] == [f"{A}?1", f"{A}?2"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("cat\tdog\n", "no column of URLs"), ("", "no column of URLs"), ("just words\n", "Accepted")],
)
def test_what_is_no_list_is_refused_with_what_is_accepted(
    content: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "list.tsv").write_text(content)

    with pytest.raises(InputError, match=sentence):
        find_list(str(tmp_path / "list.tsv"))


def test_an_absent_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find_list(str(tmp_path / "none*.tsv"))
    with pytest.raises(InputError, match="is a folder"):
        find_list(str(tmp_path))
