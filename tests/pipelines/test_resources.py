"""What a training asks of nodes that are written down here, and of the Ray that is really there."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from albef_core.errors import InputError
from pipelines import resources
from pipelines.config import PretrainConfig
from pipelines.presets import paper_4m
from pipelines.resources import (
    feed_cpus_of_worker,
    scaling_config,
    shortage,
    use_gpu,
    use_own_gpu,
)

HEAD = {"CPU": 0.0}
P4D = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:A100": 1.0}
INGEST = {"CPU": 32.0}


def asking(**changes: Any) -> PretrainConfig:
    config = PretrainConfig(corpus=Path("c"), steps=1, device="cuda", workers=8, worker_cpus=4.0)
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accelerator_type": "A100"},
        {"placement": "STRICT_PACK"},
        {"workers": 16, "placement": "SPREAD"},
        {"workers": 2, "placement": "STRICT_SPREAD"},
        {"feed_share": 0.5},
        {"workers": 64, "min_workers": 8},
        {"gpus_per_worker": 0.6, "workers": 26},
    ],
)
def test_two_p4d_and_a_head_without_cpus_have_room(changes: dict[str, Any]) -> None:
    assert shortage(asking(**changes), [HEAD, P4D, P4D, INGEST], on_gpu=True) == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"workers": 17}, "the cluster has 16 GPUs"),
        ({"workers": 64, "min_workers": 17}, "the cluster has 16 GPUs"),
        ({"accelerator_type": "H100"}, "the cluster has A100. Name one"),
        ({"workers": 9, "placement": "STRICT_PACK"}, "have room for 8"),
        ({"workers": 3, "placement": "STRICT_SPREAD"}, "have room for 2"),
        ({"worker_cpus": 14.0}, "leave none of the cluster's 96 CPUs"),
        ({"worker_cpus": 7.0, "feed_share": 0.5}, "or --feed-share"),
        # 16 GPUs and 224 CPUs in all, but six workers fit beside each other on a node.
        ({"workers": 13, "worker_cpus": 16.0}, "have room for 12"),
    ],
)
def test_what_can_never_be_had_is_named(changes: dict[str, Any], sentence: str) -> None:
    nodes = [HEAD, P4D] if changes.get("worker_cpus", 0) in (7.0, 14.0) else [HEAD, P4D, P4D]
    if changes.get("worker_cpus") == 16.0:
        nodes = [*nodes, INGEST]

    assert sentence in shortage(asking(**changes), nodes, on_gpu=True)


def test_nodes_without_gpus_train_on_cpus() -> None:
    config = asking(device="auto", workers=2, worker_cpus=0.5)

    assert shortage(config, [{"CPU": 2.0}], on_gpu=False) == ""
    assert "for decoding" in shortage(config, [{"CPU": 1.0}], on_gpu=False)


def test_the_feed_takes_all_that_workers_leave_or_its_share() -> None:
    config = asking()

    assert feed_cpus_of_worker(config, num_workers=8, num_cpus=96) == (96 - 8 * 4) / 8
    half = asking(feed_share=0.5)
    assert feed_cpus_of_worker(half, num_workers=8, num_cpus=96) == 96 / 2 / 8
    little = asking(feed_share=0.01)
    assert feed_cpus_of_worker(little, num_workers=8, num_cpus=96) == config.feed_cpus


def test_ray_train_is_asked_for_each_field() -> None:
    config = asking(gpus_per_worker=0.6, accelerator_type="A100", placement="STRICT_SPREAD")

    scaling = scaling_config(config, on_gpu=True)

    assert (scaling.num_workers, scaling.use_gpu) == (8, True)
    assert scaling._resources_per_worker_not_none == {
        "CPU": 4.0,
        "GPU": 0.6,
        "accelerator_type:A100": 0.001,
    }
    assert scaling.placement_strategy == "STRICT_SPREAD"
    elastic = scaling_config(asking(min_workers=2), on_gpu=False)
    assert (elastic.num_workers, elastic.resources_per_worker) == ((2, 8), {"CPU": 4.0})
    assert elastic.accelerator_type is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"accelerator_type": "a100"}, "Did you mean A100"),
        ({"accelerator_type": "RTX-PRO6000"}, "Did you mean RTX-PRO-6000"),
        ({"accelerator_type": "A100", "device": "cpu"}, "Drop one"),
        ({"gpus_per_worker": 0.5}, "which NCCL refuses"),
        ({"min_workers": 2, "placement": "STRICT_SPREAD"}, "sizes an elastic group"),
    ],
)
def test_flags_that_no_cluster_meets_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        use_gpu(asking(**changes))


def test_a_process_alone_is_refused_a_gpu_that_it_does_not_see() -> None:
    with pytest.raises(InputError, match="Take --workers 1"):
        use_own_gpu(asking(workers=0, worker_cpus=0.5))


@pytest.mark.cluster
def test_a_fixed_cluster_refuses_and_a_growing_one_is_waited_for(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for config in (paper_4m(), asking(device="auto", accelerator_type="A100")):
        with pytest.raises(InputError, match="the cluster has 0 GPUs"):
            use_gpu(config)

    monkeypatch.setattr(resources, "may_grow", lambda: True)

    with caplog.at_level(logging.WARNING):
        assert use_gpu(paper_4m())
        assert use_gpu(asking(device="auto", accelerator_type="A100"))
        assert not use_gpu(asking(device="auto", workers=1, worker_cpus=0.5))
        assert not use_own_gpu(asking(device="auto", workers=0, worker_cpus=0.5))
    assert "The autoscaler is asked for nodes" in caplog.text
    assert "so this trains on CPUs" in caplog.text
