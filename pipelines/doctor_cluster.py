"""The doctor's look at the cluster: enough of it, and every node alike."""

import dataclasses
import math
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import PretrainConfig
from pipelines.doctor_finding import Finding, Problem
from pipelines.manifest import MANIFEST_NAME
from pipelines.tracking import git_commit

PACKAGES = ("torch", "ray", "mlflow")
MAX_CLOCK_OFFSET_S = 1.0
ROUND_TRIPS = 3


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node says of itself."""

    node: str
    versions: dict[str, str]
    commit: str
    sees_corpus: bool
    offset_s: float = math.inf
    """Its clock less the driver's, the answer taken as made in the middle of the round trip."""
    round_trip_s: float = math.inf


def check_nodes(config: PretrainConfig) -> Finding:
    """Ask every node for its clock, its versions, and whether it sees the corpus."""
    here = node_facts(config.corpus)
    nodes = [_ask(node, config.corpus) for node in ray.nodes() if node["Alive"]]
    furthest = max(nodes, key=lambda node: abs(node.offset_s))
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    versions = " ".join(f"{name} {number}" for name, number in here.versions.items())
    return Finding.of(
        f"nodes: {len(nodes)}, {cpus:g} CPUs and {gpus:g} GPUs; clocks within"
        f" {abs(furthest.offset_s) * 1000:.0f} ms; {versions}; commit {here.commit[:12]}",
        compare(here, nodes),
    )


def compare(here: NodeFacts, nodes: list[NodeFacts]) -> list[Problem]:
    """Name what is not alike on the nodes."""
    problems = []
    for node in nodes:
        for name, number in node.versions.items():
            if number != here.versions[name]:
                problems.append(
                    Problem(
                        "fail",
                        f"Node {node.node} has {name} {number}, the driver {here.versions[name]}:"
                        " install the same requirements.lock.",
                    )
                )
        if node.commit != here.commit and "unknown" not in (node.commit, here.commit):
            problems.append(
                Problem(
                    "fail",
                    f"Node {node.node} runs commit {node.commit[:12]}, the driver"
                    f" {here.commit[:12]}: submit with --working-dir, or check out the same.",
                )
            )
        if not node.sees_corpus:
            problems.append(
                Problem(
                    "fail",
                    f"Node {node.node} does not see the corpus: put it where all nodes do.",
                )
            )
        if abs(node.offset_s) > MAX_CLOCK_OFFSET_S:
            problems.append(
                Problem(
                    "warn",
                    f"Node {node.node}'s clock is {node.offset_s:+.1f} s off: start its time"
                    " service, or curves and checkpoints will seem out of order.",
                )
            )
    return problems


def node_facts(corpus: Path) -> NodeFacts:
    """Tell what this machine runs and sees."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return NodeFacts(
        node=platform.node(),
        versions=versions,
        commit=git_commit(),
        sees_corpus=(corpus / MANIFEST_NAME).is_file(),
    )


def clock() -> float:
    """Tell the time of this machine, in seconds since 1970."""
    return time.time()


def _ask(node: dict, corpus: Path) -> NodeFacts:
    """Ask one node some times, and believe the quickest answer: the first starts a process."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(node_facts).options(num_cpus=0, scheduling_strategy=strategy)
    tell_time = ray.remote(clock).options(num_cpus=0, scheduling_strategy=strategy)
    facts = ray.get(task.remote(corpus))
    facts = dataclasses.replace(facts, node=f"{facts.node} ({node['NodeManagerAddress']})")
    for _ in range(ROUND_TRIPS):
        sent = time.time()
        theirs = ray.get(tell_time.remote())
        received = time.time()
        if received - sent < facts.round_trip_s:
            facts = dataclasses.replace(
                facts,
                offset_s=theirs - (sent + received) / 2,
                round_trip_s=received - sent,
            )
    return facts
