import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pyarrow.parquet as pq
import pytest

from pipelines.fault_answers import HOPS, OPT_OUTS
from pipelines.fault_bodies import half, jpeg
from pipelines.fault_server import FaultServer, ServerOptions, fault_server
from pipelines.faults import FAULTS
from pipelines.shapes import shapes_picture

SIZE = (160, 120)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server(ServerOptions(num_hosts=3, size=SIZE, drip_s=0.05)) as running:
        yield running


class Answer:
    """What a client that follows no redirect has seen."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status, self.headers, self.body = response.status, response.headers, body


def get(
    server: FaultServer, path: str, *, host: str = "127.0.0.1", patience_s: float = 5.0
) -> Answer:
    async def fetch() -> Answer:
        timeout = aiohttp.ClientTimeout(total=patience_s)
        async with (
            aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
            session.get(f"http://{host}:{server.port}{path}", allow_redirects=False) as response,
        ):
            return Answer(response, await response.read())

    return asyncio.run(fetch())


def test_a_picture_is_served_and_counted(server: FaultServer) -> None:
    answer = get(server, "/picture/17.jpg", host="127.0.0.2")

    url = f"127.0.0.2:{server.port}/picture/17.jpg"
    assert answer.body == jpeg(17, SIZE)
    assert answer.headers["Content-Type"] == "image/jpeg"
    counts = get(server, "/counts").body.decode()
    assert re.search(rf'"requests": {{.*"{url}": 1.*"served": {{.*"{url}": 1', counts)


def test_the_generated_set_is_served_by_seed_and_number(server: FaultServer) -> None:
    answer = get(server, "/shapes-7/12.png")

    assert answer.body == shapes_picture(7, 12).encoded
    assert answer.headers["Content-Type"] == "image/png"
    assert get(server, "/shapes-x/12.png").status == 404


@pytest.mark.parametrize("code", [403, 404, 410, 500, 503])
def test_a_status_stays(server: FaultServer, code: int) -> None:
    assert [get(server, f"/status-{code}/1.jpg").status for _ in range(4)] == [code] * 4


@pytest.mark.parametrize("code", [500, 503])
def test_a_server_error_heals_after_one_or_two_requests(server: FaultServer, code: int) -> None:
    even = [get(server, f"/heals-{code}/2.jpg").status for _ in range(3)]
    odd = [get(server, f"/heals-{code}/3.jpg").status for _ in range(3)]

    assert (even, odd) == ([code, 200, 200], [code, code, 200])


def test_a_throttled_url_takes_the_second_that_it_asks_for(server: FaultServer) -> None:
    first, early = get(server, "/throttled/1.jpg"), get(server, "/throttled/1.jpg")
    time.sleep(int(first.headers["Retry-After"]))
    late = get(server, "/throttled/1.jpg")

    assert [first.status, early.status, late.status] == [429, 429, 200]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("reset", aiohttp.ClientError),
        ("short", aiohttp.ClientPayloadError),
        ("announced", aiohttp.ClientPayloadError),
        ("never", TimeoutError),
    ],
)
def test_answers_end_badly(server: FaultServer, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        get(server, f"/{kind}/1.jpg", patience_s=0.3 if kind == "never" else 5.0)


def test_a_longer_body_than_announced_is_sent(server: FaultServer) -> None:
    async def read_all() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /long/4.jpg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        found = await reader.read(-1)
        writer.close()
        return found

    head, _, body = asyncio.run(read_all()).partition(b"\r\n\r\n")

    assert body == jpeg(4, SIZE)
    assert f"Content-Length: {len(body) // 2}".encode() in head


def test_bytes_drip(server: FaultServer) -> None:
    async def read_three() -> list[bytes]:
        url = f"http://127.0.0.1:{server.port}/drip/1.jpg"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.content_length == len(jpeg(1, SIZE))
            return [await response.content.readany() for _ in range(3)]

    started = time.monotonic()

    assert [len(piece) for piece in asyncio.run(read_three())] == [1, 1, 1]
    assert time.monotonic() - started > 2 * server.options.drip_s


def test_an_endless_body_goes_on_after_a_whole_picture(server: FaultServer) -> None:
    async def read_some() -> bytes:
        url = f"http://127.0.0.1:{server.port}/endless/1.jpg"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert response.content_length is None
            return await response.content.readexactly(3_000_000)

    assert asyncio.run(read_some()).startswith(jpeg(1, SIZE))


@pytest.mark.parametrize(("number", "redirects"), [(3, 1), (4, 2), (5, 3)])
def test_a_good_redirect_ends_at_a_picture(
    server: FaultServer, number: int, redirects: int
) -> None:
    path = f"/redirect/{number}.jpg"
    for _ in range(redirects):
        answer = get(server, path)
        assert answer.status == 302
        path = answer.headers["Location"]

    assert get(server, path).body == jpeg(number, SIZE)


def test_too_many_hops_and_loops(server: FaultServer) -> None:
    path = "/hops/1.jpg"
    for _ in range(HOPS):
        path = get(server, path).headers["Location"]

    assert get(server, path).status == 200
    assert get(server, "/loop/1.jpg").headers["Location"] == "/loop/1.jpg"


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("to-file", "file:///"),
        ("to-ftp", "ftp://"),
        ("to-private", "http://10."),
        ("to-metadata", "http://169.254.169.254/"),
    ],
)
def test_redirects_lead_where_no_crawler_should_go(
    server: FaultServer, kind: str, start: str
) -> None:
    assert get(server, f"/{kind}/1.jpg").headers["Location"].startswith(start)


@pytest.mark.parametrize("kind", OPT_OUTS)
def test_opt_outs_are_in_the_headers_of_a_good_picture(server: FaultServer, kind: str) -> None:
    answer, (name, value) = get(server, f"/{kind}/8.jpg"), OPT_OUTS[kind]

    assert (answer.headers[name], answer.body) == (value, jpeg(8, SIZE))


@pytest.mark.parametrize(
    ("kind", "header", "value"),
    [
        ("mislabeled", "Content-Type", "text/plain"),
        ("html", "Content-Type", "image/jpeg"),
        ("svg", "Content-Type", "image/svg+xml"),
        ("gzipped", "Content-Encoding", "gzip"),
        ("bomb", "Content-Encoding", "gzip"),
        ("chunked", "Transfer-Encoding", "chunked"),
        ("empty", "Content-Length", "0"),
    ],
)
def test_headers_are_as_the_fault_says(
    server: FaultServer, kind: str, header: str, value: str
) -> None:
    assert get(server, f"/{kind}/1.jpg").headers[header] == value


def test_half_a_picture_comes_with_its_true_length(server: FaultServer) -> None:
    assert get(server, "/half/9.jpg").body == jpeg(9, SIZE)[: len(jpeg(9, SIZE)) // 2]


def test_small_pictures_have_half_the_sides(server: FaultServer) -> None:
    assert get(server, "/small/9.jpg").body == jpeg(9, half(SIZE))


def test_robots_forbids_a_path_to_all_and_another_to_the_crawler(server: FaultServer) -> None:
    text = get(server, "/robots.txt").body.decode()

    assert re.search(r"\*\nDisallow: /forbidden/\n\n", text)
    assert re.search(r"albef-crawler\n(.*\n)*Disallow: /forbidden-to-us/", text)


@pytest.mark.parametrize(
    ("kind", "status", "num_bytes"),
    [
        ("robots-404", 404, range(100)),
        ("robots-500", 500, range(100)),
        ("robots-all", 200, range(10, 100)),
        ("robots-huge", 200, range(1_000_000, 3_000_000)),
        ("robots-moved", 301, range(100)),
    ],
)
def test_hosts_are_faulty_as_a_whole(
    server: FaultServer, kind: str, status: int, num_bytes: range
) -> None:
    answer = get(server, "/robots.txt", host=FAULTS[kind].host)

    assert (answer.status, len(answer.body) in num_bytes) == (status, True)


def test_a_host_has_no_robots_and_another_takes_no_connection(server: FaultServer) -> None:
    with pytest.raises(TimeoutError):
        get(server, "/robots.txt", host=FAULTS["robots-never"].host, patience_s=0.3)
    with pytest.raises(aiohttp.ClientConnectorError):
        get(server, "/refused/1.jpg", host=FAULTS["refused"].host)


@pytest.mark.parametrize("path", ["/", "/picture", "/picture/x.jpg", "/nothing/1.jpg"])
def test_other_paths_are_not_found(server: FaultServer, path: str) -> None:
    assert get(server, path).status == 404


def test_the_tool_writes_list_and_truth_says_where_it_listens_and_ends_when_asked(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "pipelines.fault_server", "--num-rows", "90"]
    command += ["--num-hosts", "2", "--width", "64", "--height", "48"]
    command += ["--list", str(tmp_path / "list.tsv"), "--truth", str(tmp_path / "truth.parquet")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0

    truth = pq.read_table(tmp_path / "truth.parquet").to_pylist()
    lines = (tmp_path / "list.tsv").read_bytes().splitlines()
    assert [len(truth), len(lines)] == [90, 90]
    assert truth[0]["url"].startswith(url)
    assert lines[0].decode().startswith(truth[0]["url"] + "\t")
