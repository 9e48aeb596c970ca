"""How a job reaches Ray: in processes of their own, because a process starts Ray but once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipelines.cluster import connect, may_grow

pytestmark = pytest.mark.cluster


def run_python(code: str, tmp_path: Path, **env: str) -> list[str]:
    """Run code in a new process with an empty home folder; return the lines that it prints."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_plain_script_starts_a_guarded_local_ray_with_at_least_two_cpus(tmp_path):
    code = """
import ray, os
from pipelines.cluster import connect, may_grow
connect(1)
connect(5)
resources = ray.cluster_resources()
print(resources["CPU"], resources["object_store_memory"] <= 2e9, os.environ["RAY_AUTH_MODE"])
"""
    assert run_python(code, tmp_path) == ["2.0 True token"]
    assert not (tmp_path / ".ray").exists()


def test_a_script_joins_the_cluster_that_ray_address_names(local_ray, tmp_path):
    address = ray.get_runtime_context().gcs_address
    code = """
import ray
from pipelines.cluster import connect, may_grow
connect(7)
print(ray.get_runtime_context().gcs_address, ray.cluster_resources()["CPU"])
"""
    lines = run_python(code, tmp_path, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert lines == [f"{address} 2.0"]


def test_connecting_twice_does_nothing(local_ray):
    before = ray.get_runtime_context().get_job_id()
    connect()
    assert ray.get_runtime_context().get_job_id() == before


def test_a_ray_without_an_autoscaler_does_not_grow_and_one_with_it_may(local_ray, tmp_path):
    assert not may_grow()
    code = """
from pipelines.cluster import connect, may_grow
connect()
print(may_grow())
"""
    # How `ray up` and KubeRay start the head.
    assert run_python(code, tmp_path, RAY_enable_autoscaler_v2="1") == ["True"]
