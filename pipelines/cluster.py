"""How a job reaches Ray: joins the cluster it was submitted to, or starts one on this machine."""

import logging
import os
import secrets

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2

from albef_core.errors import InputError

MIN_LOCAL_CPUS = 2
"""A train worker and a decoding task run at once: with fewer logical CPUs the task never starts."""
OBJECT_STORE_BYTES = 2_000_000_000
"""Most shared memory of a local Ray; a feed keeps only a few batches in it."""
OBJECT_STORE_SHARE = 0.3
"""... and no more than this share of the machine's memory."""


def connect(num_cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Connect this process to Ray; does nothing when it is connected already.

    Joins the cluster when `RAY_ADDRESS` is set, as it is inside `ray job submit`. Otherwise starts
    a local Ray.

    Args:
        num_cpus: logical CPUs of a local Ray, raised to two where it is less; default: as many
            as this process may use. A cluster that is joined keeps its own.
        dashboard: start one with a local Ray. Where worker groups come and go within one job, Ray
            Train asks it which of them have ended.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It would say, once a command, how to get its bars back.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    _guard_local_ray()
    # One process less: nobody takes this machine away with a notice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray lowers its workers' priority; here they are the work, and any other process starves them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=max(MIN_LOCAL_CPUS, num_cpus or len(os.sched_getaffinity(0))),
        include_dashboard=dashboard,
        object_store_memory=_object_store_bytes(),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def may_grow() -> bool:
    """Tell whether an autoscaler may bring nodes: `ray up` and KubeRay run one beside the head."""
    return is_autoscaler_v2(fetch_from_server=True)


def pick_device(asked: str) -> str:
    """Choose `cuda` or `cpu` for models in actors: `auto` takes GPUs where Ray has them.

    Raises:
        InputError: `cuda` is asked for, and there is none, nor will be.
    """
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if asked == "cuda" and not num_gpus and not may_grow():
        raise InputError("--device cuda: Ray sees no GPU. Use --device auto or cpu.")
    return "cuda" if asked == "cuda" or (asked == "auto" and num_gpus) else "cpu"


def check_actors(actors: int, device: str, *, cpus_left: float = 0) -> None:
    """Refuse more actors than there are GPUs, or CPUs less those that are `cpus_left` to decoding.

    They would wait for ever, unless an autoscaler brings nodes.

    Raises:
        InputError: so many do not fit.
    """
    have = ray.cluster_resources()
    room = have.get("GPU", 0) if device == "cuda" else have.get("CPU", 0) - cpus_left
    if actors > room and not may_grow():
        decoding = ", one of which decodes pictures" if cpus_left else ""
        what = "GPUs" if device == "cuda" else f"CPUs{decoding}"
        total = have.get("GPU" if device == "cuda" else "CPU", 0)
        raise InputError(
            f"--actors {actors}: Ray has {total:g} {what}. Take at most {max(1, int(room))}."
        )


def _guard_local_ray() -> None:
    # Ray listens on the machine's own address and asks for a token by default. Without this one it
    # would write a file into the home folder, which later turns authentication on for clusters
    # that know nothing of it. (The mode itself cannot be set here: Ray read it at its import.)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _object_store_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(OBJECT_STORE_BYTES, OBJECT_STORE_SHARE * memory))
