"""The doctor's trial of the training itself: batch and memory, feed against step, NaN."""

import math
from typing import Any

import ray

from albef_core.config import ModelConfig
from pipelines.config import PretrainConfig
from pipelines.doctor_bench import Numbers
from pipelines.doctor_finding import Finding, Problem
from pipelines.doctor_memory import Room
from pipelines.doctor_worker import COMFORT, FeedRate, StepRate
from pipelines.order import steps_per_epoch

ROOM_SECONDS = 20.0
FEED_SECONDS = 6.0
RATE_SECONDS = 6.0
NAMED = 3
"""So many weights are named; the rest is counted."""


def check_weights(config: PretrainConfig, tags: dict[str, str]) -> Finding:
    """Say how many weights each starting file gave; random ones where published ones would fit."""
    if not tags:
        return Finding.of("none are loaded: a run of this name goes on from its own start")
    published, own = ModelConfig(), config.model
    problems = []
    if not config.init:
        fits_image = _same(own, published, "image_width", "image_layers", "patch_size")
        fits_text = _same(own, published, "text_width", "text_mlp_width", "text_layers")
        if config.image_weights == "random" and fits_image:
            problems.append(_at_random("image", "DeiT"))
        if config.text_weights == "random" and fits_text:
            problems.append(_at_random("text", "BERT"))
    sides = "; ".join(f"{name.removeprefix('weights.')}: {text}" for name, text in tags.items())
    return Finding.of(sides, problems)


def _same(own: ModelConfig, published: ModelConfig, *names: str) -> bool:
    return all(getattr(own, name) == getattr(published, name) for name in names)


def _at_random(side: str, published: str) -> Problem:
    return Problem(
        "warn",
        f"A model of this size starts far better from {published}, as in the paper: leave"
        f" --{side}-weights out, or give a local file.",
    )


def check_room(worker: Any, config: PretrainConfig) -> Finding:
    """Find the largest batch that fits."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    workers_here = math.ceil(config.num_processes / nodes)
    room: Room | None = ray.get(worker.room.remote(ROOM_SECONDS, workers_here))
    if room is None:
        unknown = Problem("warn", "Watch the memory of the first steps, or look on Linux.")
        return Finding.of("not measured: this system does not tell the peak", [unknown])
    return judge_room(room, config)


def judge_room(room: Room, config: PretrainConfig) -> Finding:
    """Compare the largest batch with what a worker is to hold at once."""
    share = math.ceil(config.batch_size / config.num_processes)
    at_once = min(share, config.micro_batch_size or share)
    how = "by real steps" if room.is_measured else "estimated from small steps"
    more = "at least " if room.at_least else ""
    measured = (
        f"{more}{room.largest:,} pairs fit into {room.memory_bytes / 1e9:.1f} GB a worker, {how}"
        f" ({room.bytes_per_pair / 1e6:,.1f} MB a pair); {at_once} asked for"
    )
    if room.largest >= at_once:
        return Finding.of(measured)
    if not room.largest:
        remedy = "Not one pair fits: take a smaller model, or a device with more memory."
        return Finding.of(measured, [Problem("fail", remedy)])
    parts = math.ceil(share / room.largest)
    return Finding.of(
        measured,
        [
            Problem(
                "fail",
                f"{at_once} pairs do not fit: take --micro-batch-size {math.ceil(share / parts)},"
                " which gives the same gradient.",
            )
        ],
    )


def check_rates(worker: Any, config: PretrainConfig, num_images: int) -> Finding:
    """Measure the feed, then the step."""
    feed: FeedRate = ray.get(worker.feed_rate.remote(FEED_SECONDS))
    step: StepRate = ray.get(worker.step_rate.remote(RATE_SECONDS))
    return judge_rates(feed, step, config, num_images)


def judge_rates(feed: FeedRate, step: StepRate, config: PretrainConfig, num_images: int) -> Finding:
    """Compare the pairs that the feed makes with those that the step takes, for one worker."""
    share = math.ceil(config.batch_size / config.num_processes)
    part = "all" if step.num_pairs == share else f"{step.num_pairs} of"
    num_steps = config.steps or (config.epochs or 0) * steps_per_epoch(
        num_images, config.batch_size
    )
    rate = config.num_processes * min(feed.pairs_per_s, step.pairs_per_s)
    measured = (
        f"a worker: feed {feed.pairs_per_s:,.0f} pairs/s with {feed.cpus:.3g} CPUs, first batch"
        f" after {feed.first_s:.1f} s; step {step.pairs_per_s:,.3g} pairs/s with"
        f" {part} {share} pairs on {step.device};"
        f" {num_steps:,} steps take {_duration(num_steps * config.batch_size / rate)}"
    )
    return Finding.of(measured, _rate_problems(feed, step, config))


def _rate_problems(feed: FeedRate, step: StepRate, config: PretrainConfig) -> list[Problem]:
    if feed.pairs_per_s >= COMFORT * step.pairs_per_s:
        return []
    needed = math.ceil(COMFORT * feed.cpus * step.pairs_per_s / feed.pairs_per_s)
    total = math.ceil(config.num_processes * (needed + config.worker_cpus))
    remedy = (
        f"About {needed} CPUs per worker are needed for decoding, {total} in the cluster: add"
        " CPU nodes, or ingest smaller pictures."
    )
    if feed.pairs_per_s >= step.pairs_per_s:
        return [Problem("warn", f"The feed is hardly faster than the step. {remedy}")]
    waits = 1 - feed.pairs_per_s / step.pairs_per_s
    return [Problem("fail", f"The workers would wait {waits:.0%} of their time. {remedy}")]


def check_numbers(worker: Any, config: PretrainConfig) -> Finding:
    """Take the first batch forward and backward."""
    return judge_numbers(ray.get(worker.numbers.remote()), config)


def judge_numbers(numbers: Numbers, config: PretrainConfig) -> Finding:
    """Look for NaN and infinity in starting weights, losses and gradients."""
    losses = ", ".join(f"{name} {loss:.4g}" for name, loss in numbers.losses.items())
    measured = (
        f"pairs 1 to {numbers.num_pairs} of the run, {config.precision}: {losses},"
        f" gradient norm {numbers.gradient_norm:.4g}"
    )
    problems = []
    if numbers.broken_weights:
        problems.append(
            Problem(
                "fail",
                f"The starting weights hold NaN or infinity in {_some(numbers.broken_weights)}:"
                " start from another file.",
            )
        )
    elif not numbers.are_finite:
        where = _some(numbers.broken_gradients) if numbers.broken_gradients else "the losses"
        other = "take --precision fp32" if config.precision == "bf16" else "look at the weights"
        problems.append(
            Problem(
                "fail",
                f"NaN or infinity in {where}: {other}, and keep `guard_empty` in --recipe.",
            )
        )
    return Finding.of(measured, problems)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
