"""What a training asks of the cluster, and whether the cluster can ever give it."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import ray
import torch
from ray.train import ScalingConfig
from ray.util.accelerators import accelerators

from albef_core.errors import InputError
from pipelines.cluster import may_grow
from pipelines.config import TrainConfig

logger = logging.getLogger(__name__)

ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which a node says what kind of GPU it has."""
KINDS = frozenset(
    name for key, name in vars(accelerators).items() if isinstance(name, str) and key[0] != "_"
)
"""Ray's names of GPUs and their like."""
ROUNDING = 1e-6
"""Shares of a CPU do not add up exactly."""

Resources = Mapping[str, float]


def use_gpu(config: TrainConfig) -> bool:
    """Tell whether a training runs on GPUs.

    What the cluster lacks now is waited for where an autoscaler may bring it.

    Raises:
        InputError: the flags ask for what no cluster gives, or this one never will.
    """
    _check_flags(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    is_meant = config.device == "cuda" or bool(config.accelerator_type)
    on_gpu = config.device != "cpu" and (is_meant or has_gpus)
    lack = shortage(config, nodes, on_gpu=on_gpu)
    if lack and not may_grow():
        raise InputError(lack)
    if lack:
        logger.warning("%s The autoscaler is asked for nodes; `ray status` shows them.", lack)
    if not on_gpu and config.device == "auto" and may_grow():
        logger.warning("No GPU is up, so this trains on CPUs. --device cuda waits for GPUs.")
    return on_gpu


def use_own_gpu(config: TrainConfig) -> bool:
    """Tell whether a process that trains alone does so on a GPU that it sees itself.

    Raises:
        InputError: it is to, and sees none; or the cluster has no CPUs left for decoding.
    """
    sees_one = torch.cuda.is_available()
    if config.device == "cuda" and not sees_one:
        raise InputError(
            "--device cuda with --workers 0: this process sees no GPU, whatever the cluster has."
            " Take --workers 1."
        )
    return use_gpu(config) and sees_one


def scaling_config(config: TrainConfig, *, on_gpu: bool) -> ScalingConfig:
    """Say to Ray Train how many workers there are, what each holds, and how they are placed."""
    return ScalingConfig(
        num_workers=(
            (config.min_workers, config.workers) if config.min_workers else config.workers
        ),
        use_gpu=on_gpu,
        resources_per_worker=worker_resources(config, on_gpu=on_gpu),
        placement_strategy=config.placement,
        accelerator_type=config.accelerator_type or None,
    )


def worker_resources(config: TrainConfig, *, on_gpu: bool) -> dict[str, float]:
    """Say what one train worker holds."""
    return {"CPU": config.worker_cpus} | ({"GPU": config.gpus_per_worker} if on_gpu else {})


def feed_cpus_of_worker(config: TrainConfig, *, num_workers: int, num_cpus: float) -> float:
    """Give the CPUs that the decoding tasks of one worker may hold together.

    Args:
        config: `feed_share` and `worker_cpus`.
        num_workers: train workers there are now.
        num_cpus: CPUs of the whole cluster.
    """
    left = num_cpus - num_workers * config.worker_cpus
    if config.feed_share is not None:
        left = config.feed_share * num_cpus
    return max(config.feed_cpus, left / num_workers)


def shortage(config: TrainConfig, nodes: Sequence[Resources], *, on_gpu: bool) -> str:
    """Say what a training lacks on the nodes that are up, and what to do; "" where they do.

    `nodes` are the resources of each, whether or not somebody holds them now. Of an elastic group
    the fewest workers count.
    """
    asked = f"--device {config.device} with --workers {config.workers}"
    fewest = config.min_workers or config.num_processes
    num_gpus, num_cpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("GPU", "CPU"))
    if on_gpu and num_gpus + ROUNDING < fewest * config.gpus_per_worker:
        return f"{asked}: the cluster has {num_gpus:g} GPUs. Take fewer workers, or --device cpu."
    kind = config.accelerator_type
    kinds = sorted({name for node in nodes for name in node if name.startswith(ACCELERATOR)})
    if kind and ACCELERATOR + kind not in kinds:
        have = ", ".join(name.removeprefix(ACCELERATOR) for name in kinds) or "none that says so"
        return f"--accelerator-type {kind}: the cluster has {have}. Name one of these, or none."
    kept = max(config.feed_cpus, (config.feed_share or 0) * num_cpus)
    if fewest * config.worker_cpus + kept > num_cpus + ROUNDING:
        share = "" if config.feed_share is None else f" and --feed-share {config.feed_share:g}"
        return (
            f"--workers {config.workers} at --worker-cpus {config.worker_cpus}{share} leave none of"
            f" the cluster's {num_cpus:g} CPUs for decoding. Take fewer workers or lower"
            f" --worker-cpus{share and ' or --feed-share'}."
        )
    need = worker_resources(config, on_gpu=on_gpu) | ({ACCELERATOR + kind: 0.001} if kind else {})
    rooms = [_room(node, need) for node in nodes]
    room = {
        "PACK": sum(rooms),
        "SPREAD": sum(rooms),
        "STRICT_PACK": max(rooms, default=0),
        "STRICT_SPREAD": sum(room > 0 for room in rooms),
    }[config.placement]
    if room < fewest:
        held = ", ".join(f"{number:g} {name}" for name, number in need.items() if name in "CPU GPU")
        return (
            f"--workers {config.workers} at {held} each and --placement {config.placement}: the"
            f" cluster's {len(nodes)} nodes have room for {room}. Take fewer workers, lower"
            " --worker-cpus, or another --placement."
        )
    return ""


def _room(node: Resources, need: Resources) -> int:
    return int(min(node.get(name, 0) / number + ROUNDING for name, number in need.items()))


def _check_flags(config: TrainConfig) -> None:
    """Refuse what cannot be had anywhere."""
    kind = config.accelerator_type
    if kind and config.device == "cpu":
        raise InputError(f"--accelerator-type {kind} is a GPU, and --device is cpu. Drop one.")
    if kind and kind not in KINDS:
        matches = get_close_matches(kind.upper(), KINDS, n=1, cutoff=0.3)
        hint = f" Did you mean {matches[0]}?" if matches else ""
        raise InputError(
            f"--accelerator-type {kind!r} is no name of Ray's.{hint} There are A100, H100, H200"
            " and others: see the names in ray.util.accelerators."
        )
    if config.min_workers and config.placement.startswith("STRICT"):
        # It counts what fits on each node, asks for so many, and would wait for them for ever.
        raise InputError(
            f"--placement {config.placement} with --min-workers: Ray Train sizes an elastic group"
            " without it. Take PACK or SPREAD, and --worker-cpus for what a node may hold."
        )
    share_one = config.gpus_per_worker <= 0.5 and config.placement != "STRICT_SPREAD"
    if config.device != "cpu" and config.workers > 1 and share_one:
        raise InputError(
            f"--gpus-per-worker {config.gpus_per_worker:g} puts several of the {config.workers}"
            " workers on one GPU, which NCCL refuses. Take --workers 1 with a larger batch, or a"
            " whole GPU for each."
        )
