"""The generated set as the web has pictures: at URLs, of which some are dead."""

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from pipelines.fault_answers import SHAPES
from pipelines.fault_server import FaultServer, ServerOptions, fault_server
from pipelines.shapes import true_captions

HOST, PORT = "127.0.0.1", 20107
"""Of the server: the same set has the same URLs, and a corpus made of it the same content id."""
DEAD_LINKS = ("status-404", "status-410", "html", "half")
"""What the dead URLs are to the fault server, in turn."""
PICTURES_A_DEAD_LINK = 20

logger = logging.getLogger(__name__)


def shapes_server() -> AbstractContextManager[FaultServer]:
    """Serve every generated set until the block ends; where PORT is taken, on another one."""
    try:
        socket.create_server((HOST, PORT)).close()
        port = PORT
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        logger.warning("port %d is taken: pictures have other URLs, and so other ids", PORT)
        port = 0
    return fault_server(ServerOptions(port=port, num_hosts=1, faulty_hosts=False))


def write_shapes_list(path: Path, *, port: int, seed: int, num_images: int) -> None:
    """List pictures 0 to `num_images` - 1 of a set as CC12M does: URL, tab, caption.

    A picture of several captions has a row for each; a dead link comes after every
    `PICTURES_A_DEAD_LINK` pictures.
    """
    with path.open("w", encoding="utf-8") as file:
        for url, caption in _rows(f"http://{HOST}:{port}", seed, num_images):
            file.write(f"{url}\t{caption}\n")


def _rows(site: str, seed: int, num_images: int) -> Iterator[tuple[str, str]]:
    for index in range(num_images):
        for caption in true_captions(seed, index):
            yield f"{site}/{SHAPES}-{seed}/{index}.png", caption
        num_dead, is_between = divmod(index + 1, PICTURES_A_DEAD_LINK)
        if not is_between:
            kind = DEAD_LINKS[num_dead % len(DEAD_LINKS)]
            yield f"{site}/{kind}/{index}.jpg", "a picture that is no longer there"
