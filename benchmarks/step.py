"""Time and memory of pre-training steps on random input: `python -m benchmarks.step --help`.

Needs neither ray nor mlflow. Prints one line of JSON, so that tables can be made from it.
"""

import dataclasses
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.feature_queue import Queues
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from pipelines.config import PretrainConfig
from pipelines.presets import PRETRAIN


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    preset: Literal["tiny", "small", "base"] = "base"
    """Sizes of the model; random weights, because speed does not depend on them."""
    batch_size: int = 4
    """Pairs in a step."""
    steps: int = 3
    """Steps counted."""
    warmup: int = 1
    """Steps before them that are not counted."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 autocasts the encoders."""


def measure(options: Options) -> dict[str, object]:
    """Run the steps and give their times, the pairs per second and the peak memory."""
    device = torch.device(options.device)
    student, step = make_step(options)
    seconds, loss = [], math.nan
    for number in range(options.warmup + options.steps):
        started = time.perf_counter()
        loss = step().item()  # also waits for the device
        if number >= options.warmup:
            seconds.append(time.perf_counter() - started)
    return dataclasses.asdict(options) | {
        "seconds_per_step": round(statistics.median(seconds), 3),
        "pairs_per_s": round(options.batch_size / statistics.median(seconds), 3),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "loss": round(loss, 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine_name(device),
    }


def make_step(options: Options) -> tuple[ALBEF, Callable[[], Tensor]]:
    """Build a model and a function that trains it by one step and gives the loss."""
    config, sizes = sizes_of(options)
    device = torch.device(options.device)
    torch.manual_seed(0)
    student = ALBEF(sizes).to(device)
    teacher = Teacher(sizes, student).eval()
    queues = Queues(sizes, config.objective, config.recipe).to(device)
    optimizer = adamw(student, config.optim, decay_weights_only=config.recipe.decay_weights_only)
    batch = random_batch(
        options.batch_size, sizes.image_size, config.text.max_tokens, sizes.vocab_size, device
    )

    def step() -> Tensor:
        student.clamp_temperature()
        teacher.follow(student, momentum=config.objective.teacher_momentum)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            outcome = pretraining_step(
                student, teacher, queues, batch, alpha=0.4, recipe=config.recipe
            )
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        push_step(queues, outcome, num_pairs=len(batch))
        return outcome.loss.detach()

    return student, step


def sizes_of(options: Options) -> tuple[PretrainConfig, ModelConfig]:
    """Give a preset's settings, and its sizes with a vocabulary."""
    config = PRETRAIN[options.preset]()
    vocab_size = config.model.vocab_size or config.text.corpus_vocab_size
    return config, dataclasses.replace(config.model, vocab_size=vocab_size)


def random_batch(
    num_pairs: int, image_size: int, num_tokens: int, vocab_size: int, device: torch.device
) -> PairBatch:
    """Make pairs of noise, 15 % of whose words are masked."""
    words = torch.randint(1000, vocab_size, (num_pairs, num_tokens), device=device)
    is_scored = torch.rand(words.shape, device=device) < 0.15
    return PairBatch(
        images=torch.randn(num_pairs, 3, image_size, image_size, device=device),
        token_ids=words,
        attention_mask=torch.ones_like(words, dtype=torch.bool),
        masked_ids=words.masked_fill(is_scored, 103),
        mlm_labels=words.masked_fill(~is_scored, NOT_SCORED),
        image_ids=torch.arange(num_pairs, device=device),
    )


def peak_memory_gb(device: torch.device) -> float:
    """Give the most memory that this process, or its share of the device, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine_name(device: torch.device) -> str:
    """Say what a measurement was made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
