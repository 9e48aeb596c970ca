"""Fixtures for every test: one local Ray per session, and one thread of arithmetic per process."""

import os
from collections.abc import Iterator

# Before numpy, torch or Ray are imported: data tasks of two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest

CPUS = 2
OBJECT_STORE_BYTES = 1_000_000_000


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one Ray with two CPUs for all tests of the session; stop it at the end."""
    import ray

    ray.init(
        num_cpus=CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
