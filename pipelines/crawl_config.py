"""What a crawl is asked for. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albef_core.config import check_counts, check_range
from albef_core.errors import InputError

Resize = Literal["keep_ratio", "border", "center_crop", "none"]
"""How a picture is made smaller; none of them makes one larger."""


@dataclass(frozen=True, kw_only=True)
class CrawlConfig:
    """Fetch the pictures of URL lists into a store with a ledger; the same command goes on."""

    out: Path
    """Folder of the crawl: a new one, or one to go on with."""
    source: tuple[str, ...] = ()
    """Lists, by path or quoted pattern (`'laion/*.parquet'`): CC3M or CC12M TSV, SBU's JSON or its
    file of URLs beside that of captions, CSV or Parquet with named columns; .gz too. Rows of one
    that is in the crawl already are not listed again."""
    contact: str = ""
    """A URL or mail address at which hosts can ask who you are; sent with every request. Needed
    unless --allow-private-hosts."""
    url_column: str = ""
    """Column of URLs in CSV and Parquet. Default: `url` or the like, whatever its case."""
    caption_column: str = ""
    """Column of captions. Default: `text`, `caption` or the like."""
    retry: tuple[str, ...] = ()
    """Fetch again what failed in an earlier run: `transient`, `all`, or classes such as `dns` or
    `"http 503"`. Without it only what is pending is fetched."""
    resize: Resize = "keep_ratio"
    """keep_ratio: shorter side to --image-size; border: longer side, and white to a square;
    center_crop: shorter side, and the middle square; none. Nothing is made larger."""
    image_size: int = 256
    """Side in pixels that --resize aims at."""
    jpeg_quality: int = 95
    """Of pictures that are encoded again, 1 to 100; others are stored byte for byte."""
    min_side: int = 16
    """Pictures whose shorter side has fewer pixels are no photographs, and not stored."""
    max_bytes: int = 10_000_000
    """Longest body, as it comes and as it is unpacked."""
    connect_timeout_s: float = 10.0
    """Longest wait for a connection: name, TCP and TLS."""
    first_byte_timeout_s: float = 20.0
    """Longest wait for an answer to begin, and for it to go on."""
    transfer_timeout_s: float = 60.0
    """Longest time that one URL may take, with its redirects."""
    max_redirects: int = 5
    """Redirects that are followed for one URL."""
    retries: int = 2
    """Further tries within a run, where a failure may pass."""
    backoff_s: float = 2.0
    """Wait before the first of them, doubled for each after, with up to half as much jitter."""
    max_wait_s: float = 120.0
    """Longest Retry-After that is waited for; a host that asks for more is left for this run."""
    connections: int = 256
    """URLs that one actor has under way at once."""
    connections_per_host: int = 4
    """... of one host."""
    host_interval_s: float = 0.0
    """Least time between two requests to one host."""
    obey_robots: bool = True
    """Ask each host's robots.txt first (RFC 9309)."""
    obey_opt_out: bool = True
    """Leave pictures whose answer says `X-Robots-Tag: noai` and the like, or `tdm-reservation`."""
    allow_private_hosts: bool = False
    """Let a list lead to loopback and private addresses: for tests on your own machine."""
    num_partitions: int | None = None
    """Parts that hosts are dealt into, fixed when a crawl starts; one actor works on one at a time.
    Default: one for about 20,000 rows, 4 to 1,024."""
    actors: int | None = None
    """Processes that fetch. Default: as many as the cluster has CPUs for."""
    actor_cpus: int = 2
    """CPUs of one of them: its threads that decode."""
    commit_rows: int = 1000
    """Rows that end between two commits: what a kill can cost."""
    commit_s: float = 5.0
    """... and the longest time between them."""
    track: bool = True
    """Log the counts as an MLflow run."""
    experiment: str = "albef-crawl"
    """MLflow experiment of that run."""

    def __post_init__(self) -> None:
        check_counts(
            self,
            *("image_size", "jpeg_quality", "min_side", "max_bytes", "connections"),
            *("connections_per_host", "num_partitions", "actors", "actor_cpus", "commit_rows"),
        )
        check_counts(self, "retries", "max_redirects", least=0)
        check_range(self, "jpeg_quality", low=1.0, high=100.0)
        check_range(
            self, "connect_timeout_s", "first_byte_timeout_s", "transfer_timeout_s", low=0.01
        )
        check_range(self, "backoff_s", "max_wait_s", "host_interval_s", "commit_s")
        words = self.contact.split()
        if self.contact and (len(words) != 1 or not self.contact.isprintable()):
            raise InputError(
                f"--contact {self.contact!r}: is sent in a header. Give one URL or mail address."
            )
        if "@" not in self.contact and "://" not in self.contact and not self.allow_private_hosts:
            raise InputError(
                "--contact is missing: whoever runs a host that is crawled must be able to reach"
                " you. Give a URL or mail address; only --allow-private-hosts does without."
            )
