"""What checkpoints cost a training: `python -m benchmarks.checkpoint --help`.

Takes steps on random input without Ray, rounds with and without a checkpoint in turn, so that a
machine that others use slows both alike. Prints one line of JSON.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro

from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.pretraining import pretraining_step, push_step
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from benchmarks.step import machine_name, random_batch
from pipelines.checkpoint import Snapshotter, TrainState, write_snapshot
from pipelines.checkpoint_files import Progress
from pipelines.checkpoint_store import CheckpointStore
from pipelines.checkpoint_writer import BackgroundWriter
from pipelines.config import PretrainConfig
from pipelines.presets import PRETRAIN
from pipelines.pretraining_task import save_student


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    preset: Literal["tiny", "small", "base"] = "tiny"
    """Sizes of the model; random weights, because speed does not depend on them."""
    batch_size: int = 16
    """Pairs in a step. Small batches make short steps, and so checkpoints dear."""
    every: int = 50
    """Steps between checkpoints: those of one round."""
    rounds: int = 5
    """Pairs of rounds: one with a checkpoint, one without."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 autocasts the encoders."""
    folder: Path | None = None
    """Where checkpoints go. Default: a temporary folder."""


def measure(options: Options) -> dict[str, object]:
    """Take rounds of steps in turn and give their rates, the ratio and the times of the writer."""
    config = _sized(PRETRAIN[options.preset]())
    device = torch.device(options.device)
    torch.manual_seed(0)
    state = _new_state(config, device)
    step = _stepper(state, config, options, device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = _TimedStore(folder)
        checkpoints = _Checkpoints(state, store, config)
        for _ in range(3):
            step()
        checkpoints.save(0)  # the first one allocates its memory
        checkpoints.writer.wait()
        checkpoints.blocked_s.clear()
        store.seconds.clear()
        store.cpu_seconds.clear()
        plain: list[tuple[float, float]] = []
        kept: list[float] = []
        for number in range(2 * options.rounds):
            is_kept = number % 4 in (1, 2)  # plain, kept, kept, plain: drifts cancel
            started = time.perf_counter(), time.process_time()
            if is_kept:
                checkpoints.save(number)
            for _ in range(options.every):
                step()
            if is_kept:
                checkpoints.writer.wait()
            spent_s = time.perf_counter() - started[0]
            spent_cpu_s = time.process_time() - started[1]
            if is_kept:
                kept.append(spent_s)
            else:
                plain.append((spent_s, spent_cpu_s))
        checkpoints.writer.close()
    pairs = options.every * options.batch_size
    plain_s, plain_cpu_s = zip(*plain, strict=True)
    blocked_s, writer_cpu_s = map(statistics.median, (checkpoints.blocked_s, store.cpu_seconds))
    busy_s = blocked_s + writer_cpu_s
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()} | {
        "plain_pairs_per_s": round(pairs / statistics.median(plain_s), 2),
        "checkpointed_pairs_per_s": round(pairs / statistics.median(kept), 2),
        "cost_percent": _cost_percent(plain_s, kept),
        # Where no core is free for the writer; counted, so that it holds on a busy machine too.
        "cost_percent_at_most": round(100 * busy_s / statistics.median(plain_cpu_s), 2),
        "blocked_ms": round(1000 * blocked_s, 1),
        "writer_cpu_ms": round(1000 * writer_cpu_s, 1),
        "checkpoint_mb": round(store.num_bytes / 1e6, 1),
        "writer_mb_per_s": round(store.num_bytes / 1e6 / statistics.median(store.seconds)),
        "threads": torch.get_num_threads(),
        "machine": machine_name(device),
    }


def _cost_percent(plain: Sequence[float], kept: Sequence[float]) -> float:
    ratios = [with_it / without for with_it, without in zip(kept, plain, strict=True)]
    return round(100 * (statistics.median(ratios) - 1), 2)


class _TimedStore(CheckpointStore):
    """A store that keeps the seconds and bytes of each write: files, hashes, fsync."""

    def __init__(self, location: str) -> None:
        super().__init__(location, keep_last=2)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.num_bytes = 0

    def write(self, progress: Progress, fill: Callable[[Path], None]) -> str:
        """Write as any store does."""
        started = time.perf_counter(), time.thread_time()
        name = super().write(progress, fill)
        self.seconds.append(time.perf_counter() - started[0])
        self.cpu_seconds.append(time.thread_time() - started[1])
        self.num_bytes = sum(path.stat().st_size for path in Path(self.location, name).iterdir())
        return name


class _Checkpoints:
    """Takes and writes checkpoints as a training does, and keeps how long each stopped it."""

    def __init__(self, state: TrainState, store: _TimedStore, config: PretrainConfig) -> None:
        self.writer = BackgroundWriter(store)
        self.blocked_s: list[float] = []
        self._config, self._snapshotter = config, Snapshotter(state)
        words = ("".join(letters) for letters in product("abcdefghijklmnop", repeat=3))
        tokenizer = Tokenizer.learn(words, vocab_size=config.model.vocab_size)
        self._save = partial(save_student, config=config, tokenizer=tokenizer)

    def save(self, step: int) -> None:
        """Take a snapshot, and let it be written while steps go on."""
        started = time.perf_counter()
        self.writer.wait()
        snapshot = self._snapshotter.take()

        def fill(folder: Path) -> None:
            write_snapshot(
                snapshot,
                folder,
                config=self._config,
                text_layers=self._config.model.text_layers,
                save=self._save,
            )

        self.writer.save(_progress(step), fill)
        self.blocked_s.append(time.perf_counter() - started)


def _sized(config: PretrainConfig) -> PretrainConfig:
    vocab_size = config.model.vocab_size or config.text.corpus_vocab_size
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size)
    )


def _new_state(config: PretrainConfig, device: torch.device) -> TrainState:
    student = ALBEF(config.model).to(device)
    return TrainState(
        student=student,
        teacher=Teacher(config.model, student).eval(),
        queues=Queues(config.model, config.objective, config.recipe).to(device),
        optimizer=adamw(student, config.optim, decay_weights_only=config.recipe.decay_weights_only),
    )


def _stepper(
    state: TrainState, config: PretrainConfig, options: Options, device: torch.device
) -> Callable[[], None]:
    batch = random_batch(
        options.batch_size,
        config.model.image_size,
        config.text.max_tokens,
        config.model.vocab_size,
        device,
    )
    momentum = config.objective.teacher_momentum

    student, teacher, queues = state.student, state.teacher, state.queues
    assert isinstance(student, ALBEF)
    assert isinstance(teacher, Teacher)
    assert queues is not None

    def step() -> None:
        student.clamp_temperature()
        teacher.follow(student, momentum=momentum)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            outcome = pretraining_step(
                student, teacher, queues, batch, alpha=0.4, recipe=config.recipe
            )
        state.optimizer.zero_grad()
        outcome.loss.backward()
        state.optimizer.step()
        push_step(queues, outcome, num_pairs=len(batch))
        outcome.loss.item()  # waits for the device

    return step


def _progress(step: int) -> Progress:
    return Progress(
        step=step,
        pairs_seen=0,
        epoch=0,
        batch_size=0,
        seed=0,
        corpus_id="",
        plan={},
        config_digest="",
        world_size=1,
        metrics={},
        bad_ids=[],
        unsent=[],
        versions={},
    )


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
