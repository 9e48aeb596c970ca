"""The generated set on a web server of its own, and the list of its URLs."""

import socket
import urllib.request
from pathlib import Path

import pytest

from pipelines import shapes_web
from pipelines.shapes import shapes_picture, true_captions
from pipelines.shapes_web import PICTURES_A_DEAD_LINK, shapes_server, write_shapes_list


def urls_of(path: Path) -> list[str]:
    return [line.split("\t")[0] for line in path.read_text().splitlines()]


def test_a_list_names_every_caption_of_every_picture_and_some_dead_links(tmp_path: Path) -> None:
    write_shapes_list(tmp_path / "list.tsv", port=1234, seed=5, num_images=41)

    rows = [line.split("\t") for line in (tmp_path / "list.tsv").read_text().splitlines()]
    alive = [(url, caption) for url, caption in rows if "/shapes-5/" in url]
    assert [caption for _, caption in alive] == [
        caption for index in range(41) for caption in true_captions(5, index)
    ]
    assert len({url for url, _ in alive}) == 41
    assert len(rows) - len(alive) == 41 // PICTURES_A_DEAD_LINK
    assert all(url.startswith("http://127.0.0.1:1234/") for url, _ in rows)


def test_where_the_port_is_taken_another_one_is_used_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(shapes_web, "PORT", taken)
        with shapes_server() as server:
            assert server.port != taken
            write_shapes_list(tmp_path / "list.tsv", port=server.port, seed=0, num_images=1)
            (url,) = set(urls_of(tmp_path / "list.tsv"))
            with urllib.request.urlopen(url) as answer:
                assert answer.read() == shapes_picture(0, 0).encoded
    assert f"port {taken} is taken" in caplog.text
