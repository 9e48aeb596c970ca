"""What a pre-training would cost: steps, hours, storage, CPUs for the feed. Nothing is trained."""

import dataclasses
import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from pipelines.checkpoint_store import best_curve
from pipelines.config import PlanConfig, PretrainConfig
from pipelines.doctor_storage import checkpoint_bytes
from pipelines.doctor_training import COMFORT
from pipelines.manifest import read_manifest
from pipelines.order import steps_per_epoch
from pipelines.presets import PRETRAIN

TABLE = Path(__file__).parents[1] / "benchmarks" / "throughput.json"
Label = Literal["measured", "reported", "estimated"]
Range = tuple[float, float]
"""Lowest and highest."""

PEAK_TFLOPS = {
    "A100": {"bf16": 312, "fp32": 19.5},
    "L4": {"bf16": 121, "fp32": 30.3},
    "L40S": {"bf16": 362, "fp32": 91.6},
    "H100": {"bf16": 989, "fp32": 67},
    "H200": {"bf16": 989, "fp32": 67},
    "B200": {"bf16": 2250, "fp32": 80},
}
"""Dense peak of one GPU by NVIDIA's data sheets (SXM where there are several), by Ray's name."""
UTILIZATION = (0.07, 0.15)
"""Shares of the peak that an estimate assumes, of the bf16 one on A100. Low: the published code, in
the middle of what is reported (74 pairs/s of 285 GFLOP). High: open_clip's ViT-B/16 (332 pairs/s by
its docs/PRETRAINED.md, up to 396 by others, of 123 GFLOP)."""
SAME = 0.01
"""A row whose FLOPs differ by no more than this share is of the config's own model."""
PICTURE_BYTES = 30_000
"""A JPEG of 256 px as img2dataset writes it (29.9 GB a million pictures), where no corpus is."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast one device is."""

    on: str
    """GPU by Ray's name; `cpu`: one core."""
    label: Label
    pairs_per_s: Range
    source: str
    """Who says so, of which hardware and when."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes on one kind of device."""

    throughput: Throughput
    device_hours: Range
    days: Range
    """With the config's workers, were they as fast together as one by one."""
    price: Range
    """Device hours at the price given."""
    feed_cpus: int
    """CPUs that decode as fast as the fastest of these would take."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run holds, and what it takes on each kind of device."""

    num_images: int
    num_steps: int
    num_pairs: int
    gflop_per_pair: float
    corpus_bytes: int
    is_corpus_there: bool
    checkpoint_bytes: int
    num_checkpoints: int
    feed: Throughput
    """Of one CPU."""
    costs: list[Cost]


def make_plan(config: PlanConfig) -> Plan:
    """Plan a pre-training on one kind of GPU, or on each that is known.

    Raises:
        InputError: no corpus and no --images is given, or nothing is known of the GPU.
    """
    is_there = config.corpus != Path()
    if is_there:
        manifest = read_manifest(config.corpus)
        num_images, corpus_bytes = manifest.num_images, sum(s.bytes for s in manifest.shards)
    elif config.images:
        num_images, corpus_bytes = config.images, config.images * PICTURE_BYTES
    else:
        raise InputError("A plan needs --corpus DIR, or --images N where there is none yet.")
    epoch = steps_per_epoch(num_images, config.batch_size)
    num_steps = config.steps or (config.epochs or 0) * epoch
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    (feed,) = (_throughput(row | {"on": "cpu"}) for row in table["feed"])
    rates = throughputs(config, table["steps"])
    return Plan(
        num_images=num_images,
        num_steps=num_steps,
        num_pairs=num_steps * config.batch_size,
        gflop_per_pair=gflop_per_pair(config),
        corpus_bytes=corpus_bytes,
        is_corpus_there=is_there,
        checkpoint_bytes=checkpoint_bytes(dataclasses.replace(config, model=_sizes(config))),
        num_checkpoints=config.keep_last + 1 + bool(best_curve(config)),
        feed=feed,
        costs=[_cost(config, num_steps * config.batch_size, rate, feed) for rate in rates],
    )


def throughputs(config: PlanConfig, rows: list[dict[str, Any]]) -> list[Throughput]:
    """Say how fast each device takes the pairs of a config.

    Of the table's rows for a device the one counts whose preset is nearest in FLOPs. If that is the
    config's own, its label stands; else its rate is multiplied by the ratio of FLOPs a pair, and
    called `estimated`. A GPU without a row is estimated as well:

        pairs/s = peak FLOP/s of the precision x utilization / FLOP a pair

    Raises:
        InputError: nothing is known of --on.
    """
    known = [*dict.fromkeys([row["on"] for row in rows] + list(PEAK_TFLOPS))]
    if config.on and config.on not in known:
        matches = get_close_matches(config.on.lower(), [name.lower() for name in known], n=1)
        hint = next((f" Did you mean {n}?" for n in known if n.lower() in matches), "")
        raise InputError(
            f"--on {config.on}: nothing is known of it.{hint} There are {', '.join(known)}."
        )
    return [_of_device(config, name, rows) for name in ([config.on] if config.on else known)]


def gflop_per_pair(config: PretrainConfig) -> float:
    """Count the GFLOPs (a multiplication and an addition are two) that a step spends on a pair.

    The student's passes count three times, once forward and twice backward, those of the teacher
    once. A pair is seen by the image encoder in one pass of each, by the text encoder in two of
    each (caption, masked caption), by the multimodal encoder in four of the student (matched, two
    negatives, masked) and one of the teacher. The student makes the keys and values of a picture
    once; micro-batches repeat its forward passes, and make them for each pair, negative and masked
    caption. Attention's products count; norms, dropout, softmax and the optimizer do not.
    """
    sizes, tokens = _sizes(config), config.text.max_tokens
    student, num_projected = (4, 3) if config.micro_batch_size else (3, 1)
    flop = (student + 1) * _image_flop(sizes)
    flop += 2 * (student + 1) * sizes.text_layers * _text_layer_flop(sizes, tokens)
    flop += (4 * student + 1) * sizes.fusion_layers * _fusion_layer_flop(sizes, tokens)
    flop += (num_projected * student + 1) * sizes.fusion_layers * _projection_flop(sizes)
    head = 2 * sizes.text_width * (sizes.text_width + sizes.vocab_size)
    flop += 4 * config.objective.mask_share * tokens * head
    keys = config.batch_size + config.objective.num_slots
    flop += 2 * 4 * 2 * sizes.feature_size * keys
    return flop / 1e9


def _image_flop(sizes: ModelConfig) -> float:
    width, patches = sizes.image_width, (sizes.image_size // sizes.patch_size) ** 2
    tokens = patches + 1
    weights = width * width * (4 + 2 * sizes.image_mlp_ratio)
    layer = 2 * weights * tokens + 4 * tokens**2 * width
    return sizes.image_layers * layer + 2 * 3 * sizes.patch_size**2 * width * patches


def _text_layer_flop(sizes: ModelConfig, tokens: int) -> float:
    width = sizes.text_width
    weights = 4 * width**2 + 2 * width * sizes.text_mlp_width
    return 2 * weights * tokens + 4 * tokens**2 * width


def _fusion_layer_flop(sizes: ModelConfig, tokens: int) -> float:
    width, looked_at = sizes.text_width, _image_tokens(sizes)
    queries = 2 * 2 * width**2 * tokens
    return _text_layer_flop(sizes, tokens) + queries + 4 * tokens * looked_at * width


def _projection_flop(sizes: ModelConfig) -> float:
    return 2 * 2 * sizes.image_width * sizes.text_width * _image_tokens(sizes)


def _image_tokens(sizes: ModelConfig) -> int:
    return (sizes.image_size // sizes.patch_size) ** 2 + 1


def _sizes(config: PretrainConfig) -> ModelConfig:
    """Take the largest vocabulary where the corpus is still to give it."""
    vocab_size = config.model.vocab_size or config.text.corpus_vocab_size
    return dataclasses.replace(config.model, vocab_size=vocab_size)


def _of_device(config: PlanConfig, name: str, rows: list[dict[str, Any]]) -> Throughput:
    own = gflop_per_pair(config)
    distances = {
        abs(math.log(gflop_per_pair(PRETRAIN[row["preset"]]()) / own)): row
        for row in rows
        if row["on"] == name
    }
    if not distances:
        peak = PEAK_TFLOPS[name][config.precision] * 1e3
        low, high = (peak * share / own for share in UTILIZATION)
        shares = " to ".join(f"{share:.0%}" for share in UTILIZATION)
        source = f"{shares} of {peak / 1e3:g} TFLOP/s in {config.precision}"
        return Throughput(on=name, label="estimated", pairs_per_s=(low, high), source=source)
    row = distances[min(distances)]
    theirs = PRETRAIN[row["preset"]]()
    ratio = gflop_per_pair(theirs) / own
    # The published code ran in fp32 what the paper's presets run in bf16.
    if abs(ratio - 1) < SAME and config.precision in (row["precision"], theirs.precision):
        return _throughput(row)
    low, high = row["pairs_per_s"]
    return Throughput(
        on=name,
        label="estimated",
        pairs_per_s=(low * ratio, high * ratio),
        source=f"by FLOPs from {row['preset']}, {row['label']}: {_source(row)}",
    )


def _throughput(row: dict[str, Any]) -> Throughput:
    low, high = row["pairs_per_s"]
    return Throughput(
        on=row["on"], label=row["label"], pairs_per_s=(low, high), source=_source(row)
    )


def _source(row: dict[str, Any]) -> str:
    return f"{row['hardware']}, {row['date']}; {row['source']}"


def _cost(config: PlanConfig, num_pairs: int, rate: Throughput, feed: Throughput) -> Cost:
    slow, fast = rate.pairs_per_s
    hours = num_pairs / fast / 3600, num_pairs / slow / 3600
    return Cost(
        throughput=rate,
        device_hours=hours,
        days=(hours[0] / config.num_processes / 24, hours[1] / config.num_processes / 24),
        price=(hours[0] * config.price, hours[1] * config.price),
        feed_cpus=math.ceil(COMFORT * config.num_processes * fast / feed.pairs_per_s[0]),
    )
