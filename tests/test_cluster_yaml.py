"""cluster.yaml, as Ray reads it: its schema, and what its autoscaler would do with the file."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from pipelines.presets import paper_4m
from pipelines.resources import worker_resources

ROOT = Path(__file__).parents[1]
Cluster = dict[str, Any]


def check(cluster: Cluster) -> Cluster:
    """Validate as `ray up` would, and what it would not; give the file with Ray's defaults."""
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    # The raw file first: `validate_config` takes only what `prepare_config` has filled in.
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    for name, kind in prepared["available_node_types"].items():
        if kind.get("min_workers", 0) > kind["max_workers"]:
            raise ValueError(f"{name}: min_workers is more than max_workers")
        if "NetworkInterfaces" in kind["node_config"]:
            _check_interfaces(name, kind["node_config"])
    return prepared


def _check_interfaces(name: str, machine: Cluster) -> None:
    """Refuse what Ray's AWS provider refuses; it needs boto3 to say so itself."""
    if {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(machine):
        raise ValueError(f"{name}: subnets and groups belong to the interfaces alone")
    for interface in machine["NetworkInterfaces"]:
        if not interface.get("SubnetId") or not interface.get("Groups"):
            raise ValueError(f"{name}: an interface without subnet or group")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_file(cluster: Cluster) -> None:
    prepared = check(cluster)

    kinds = prepared["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    gpus = {name: kind["resources"]["GPU"] for name, kind in kinds.items() if "GPU" in str(kind)}
    assert gpus == {"a100_on_demand": 8, "a100_spot": 8}
    assert all(kind.get("min_workers", 0) == 0 for kind in kinds.values()), "nothing runs idle"


def at(*path: str | int, value: Any) -> Callable[[Cluster], None]:
    """Make a fault: one value of the file that is another."""

    def put(cluster: Cluster) -> None:
        *folders, last = path
        for key in folders:
            cluster = cluster[key]
        cluster[last] = value

    return put


KINDS = "available_node_types"


@pytest.mark.parametrize(
    "fault",
    [
        at("max_worker", value=3),
        at("idle_timeout_minutes", value="15"),
        at("head_node_type", value="haed"),
        at("auth", "ssh_usr", value="ubuntu"),
        at("provider", "type", value=None),
        at(KINDS, "head", "resources", "CPU", value=0.5),
        at(KINDS, "ingest", "resources", "CPU", value="32"),
        at(KINDS, "ingest", value={"node_config": {}}),
        at(KINDS, "ingest", "labels", value={"role": 1}),
        at(KINDS, "a100_spot", "priority", value="high"),
        at(KINDS, "a100_spot", "min_workers", value=5),
        at(KINDS, "a100_spot", "node_config", "SubnetIds", value=["subnet-1"]),
        at(KINDS, "a100_spot", "node_config", "NetworkInterfaces", 3, value={"Groups": ["sg-1"]}),
        at("max_workers", value=-1),
        at("setup_commands", value="make setup"),
    ],
)
def test_a_planted_fault_is_refused(cluster: Cluster, fault: Callable[[Cluster], None]) -> None:
    broken = copy.deepcopy(cluster)
    fault(broken)

    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check(broken)


def launched(cluster: Cluster, *demands: dict[str, float]) -> Counter[str]:
    """Ask Ray's autoscaler which nodes it would start for these demands, from none but the head."""
    config = AutoscalingConfig(check(cluster), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make(demand) for demand in demands]
        ),
    )
    reply = ResourceDemandScheduler().schedule(request)
    nodes = Counter({node.instance_type: node.count for node in reply.to_launch})
    if reply.infeasible_resource_requests:
        nodes["infeasible"] = len(reply.infeasible_resource_requests)
    return nodes


PAPER = [worker_resources(paper_4m(), on_gpu=True) | {"accelerator_type:A100": 0.001}] * 8


def test_the_paper_s_eight_workers_bring_one_spot_machine(cluster: Cluster) -> None:
    assert launched(cluster, *PAPER) == {"a100_spot": 1}


def test_without_spot_they_bring_one_on_demand(cluster: Cluster) -> None:
    without = copy.deepcopy(cluster)
    without[KINDS]["a100_spot"]["max_workers"] = 0

    assert launched(without, *PAPER) == {"a100_on_demand": 1}


def test_decoding_brings_cpus_and_no_gpu(cluster: Cluster) -> None:
    assert launched(cluster, *[{"CPU": 0.5}] * 100) == {"ingest": 2}


def test_what_no_kind_of_node_has_brings_nothing(cluster: Cluster) -> None:
    assert launched(cluster, {"GPU": 1, "accelerator_type:H100": 0.001}) == {"infeasible": 1}


def test_nothing_is_installed_without_a_hash_but_what_ray_s_provider_needs(
    cluster: Cluster,
) -> None:
    commands = [c for key, value in cluster.items() if key.endswith("commands") for c in value]
    installs = [command for command in commands if "pip install" in command]

    assert [c for c in installs if "--require-hashes" not in c] == cluster["head_setup_commands"]
    assert not [c for c in commands if "index-url" in c]
    lock = cluster["file_mounts"]["/home/ubuntu/albef/requirements.lock"]
    assert (ROOT / lock).is_file()


def test_a_job_that_is_stopped_has_time_for_a_step_and_a_checkpoint(cluster: Cluster) -> None:
    start = cluster["head_start_ray_commands"][-1]

    assert "RAY_JOB_STOP_WAIT_TIME_S=300" in start.split("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in start
