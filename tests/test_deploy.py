"""deploy/: the KubeRay files against the published CRD's fields, the image against the lock."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
Body = dict[str, Any]


def fields(required: tuple[str, ...] = (), **types: Any) -> Body:
    """Describe an object that has no other fields than these."""
    return {
        "type": "object",
        "properties": types,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def list_of(item: Body) -> Body:
    return {"type": "array", "items": item, "minItems": 1}


# What our files use of ray.io/v1: names, types and enums from ray-operator/config/crd/bases of
# ray-project/kuberay at feeaf72 (2026-08-19), against the whole of which they were held by hand.
CONTAINER = fields(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    env=list_of(fields(("name",), name=TEXT, value=TEXT)),
    envFrom=list_of(fields(secretRef=fields(name=TEXT, optional=FLAG))),
    ports=list_of(fields(("containerPort",), containerPort=NUMBER, name=TEXT)),
    resources=fields(requests=TEXTS, limits=TEXTS),
    volumeMounts=list_of(fields(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
POD = fields(
    ("containers",),
    containers=list_of(CONTAINER),
    terminationGracePeriodSeconds=COUNT,
    securityContext=fields(runAsNonRoot=FLAG, runAsUser=NUMBER, fsGroup=NUMBER),
    nodeSelector=TEXTS,
    tolerations=list_of(fields(key=TEXT, operator=TEXT, effect=TEXT)),
    volumes=list_of(
        fields(
            ("name",),
            name=TEXT,
            persistentVolumeClaim=fields(("claimName",), claimName=TEXT),
            emptyDir=fields(medium=TEXT, sizeLimit=TEXT),
        )
    ),
)
TEMPLATE = fields(spec=POD)
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        env=list_of(fields(("name",), name=TEXT, value=TEXT)),
    ),
    headGroupSpec=fields(("template",), rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs=list_of(
        fields(
            ("groupName", "maxReplicas", "minReplicas", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            priority=NUMBER,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        )
    ),
)
JOB = fields(
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=NUMBER,
    rayClusterSpec=CLUSTER,
)


def resource(kind: str, spec: Body) -> Body:
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        **head,
        metadata=fields(("name",), name=TEXT),
        spec=spec,
    )


def read(name: str) -> Body:
    return yaml.safe_load((DEPLOY / "kuberay" / f"{name}.yaml").read_text())


def check_job(job: Body) -> None:
    """Refuse what the API server or the operator would."""
    jsonschema.validate(job, resource("RayJob", JOB))
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            raise ValueError(f"{group['groupName']}: replicas lie outside their bounds")
        mounted = {m["name"] for c in containers(group) for m in c["volumeMounts"]}
        if mounted != {volume["name"] for volume in group["template"]["spec"]["volumes"]}:
            raise ValueError(f"{group['groupName']}: mounts and volumes differ")


def containers(group: Body) -> list[Body]:
    return group["template"]["spec"]["containers"]


def test_both_files_have_no_field_but_those_of_the_crd_and_the_same_cluster() -> None:
    job, cluster = read("rayjob"), read("raycluster")

    check_job(job)
    jsonschema.validate(cluster, resource("RayCluster", CLUSTER))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def at(*path: str | int, value: Any) -> Callable[[Body], None]:
    """Make a fault: one value of the file that is another."""

    def put(body: Body) -> None:
        *folders, last = path
        for key in folders:
            body = body[key]
        body[last] = value

    return put


SPEC = ("spec", "rayClusterSpec")
GROUP = (*SPEC, "workerGroupSpecs", 1)


@pytest.mark.parametrize(
    "fault",
    [
        at("kind", value="RayJobs"),
        at("spec", "entryPoint", value="python x.py"),
        at("spec", "submissionMode", value="K8s"),
        at("spec", "backoffLimit", value="2"),
        at(*SPEC, "autoscalerOptions", "version", value="v3"),
        at(*SPEC, "headGroupSpec", "rayStartParams", "num-cpus", value=0),
        at(*GROUP, "maxReplica", value=4),
        at(*GROUP, "minReplicas", value=5),
        at(*GROUP, "template", "spec", "containers", 0, "resource", value={}),
        at(*GROUP, "template", "spec", "volumes", value=[{"name": "other"}]),
    ],
)
def test_a_planted_fault_is_refused(fault: Callable[[Body], None]) -> None:
    broken = copy.deepcopy(read("rayjob"))
    fault(broken)

    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check_job(broken)


def test_the_head_works_for_nobody_and_gives_a_stopped_job_its_time() -> None:
    spec = read("raycluster")["spec"]
    (head,) = containers(spec["headGroupSpec"])

    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    wait = next(int(e["value"]) for e in head["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    grace = spec["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 3 < wait < grace
    secrets = [
        e for group in spec["workerGroupSpecs"] for c in containers(group) for e in c["envFrom"]
    ]
    assert all(secret == {"secretRef": {"name": "albef", "optional": True}} for secret in secrets)


def test_the_image_has_the_lock_s_python_and_hashes_and_no_root() -> None:
    docker = (DEPLOY / "docker" / "Dockerfile").read_text()
    locked_for = re.search(r"--python-version ([\d.]+)", (ROOT / "Makefile").read_text())

    assert locked_for is not None
    assert f"ARG BASE=python:{locked_for[1]}-" in docker
    assert "--require-hashes --requirement requirements.lock" in docker
    assert docker.splitlines()[-1] == "USER ray"
    uid = re.search(r"useradd .*--uid (\d+) ray", docker)
    assert uid is not None
    pod = read("raycluster")["spec"]["headGroupSpec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == int(uid[1])
    for source in re.findall(r"^COPY (\S+)", docker, flags=re.MULTILINE):
        assert (ROOT / source).exists(), source


def test_no_file_of_the_cluster_names_a_package_index() -> None:
    files = [f for f in DEPLOY.rglob("*") if f.is_file()] + [ROOT / "cluster.yaml"]

    assert [f.name for f in files if re.search(r"pypi|index-url|simple/", f.read_text())] == []
