"""A training that goes on from a checkpoint is the same training, to the last bit."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, OptimConfig, TextConfig
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.pretraining import pretraining_step
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import load_model
from pipelines.checkpoint import Snapshotter, TrainState, restore, write_snapshot
from pipelines.config import PretrainConfig
from pipelines.pretraining_task import save_student

NUM_PAIRS, NUM_TOKENS, NUM_SLOTS = 4, 6, 10
TOKENIZER = Tokenizer.learn(["a red square", "a blue circle"], vocab_size=30)
CONFIG = PretrainConfig(
    corpus=Path("corpus"),
    steps=6,
    model=ModelConfig(
        image_size=16,
        patch_size=8,
        image_width=16,
        image_layers=1,
        image_heads=2,
        text_width=24,
        text_heads=2,
        text_mlp_width=32,
        text_layers=1,
        fusion_layers=1,
        vocab_size=TOKENIZER.vocab_size,
        max_positions=12,
        feature_size=8,
        dropout=0.1,
    ),
    text=TextConfig(max_tokens=NUM_TOKENS),
    objective=ObjectiveConfig(num_slots=NUM_SLOTS),
    optim=OptimConfig(lr=1e-2, clip_norm=1.0),
)
AS_PRETRAINED = {
    "config": CONFIG,
    "text_layers": CONFIG.model.text_layers,
    "save": partial(save_student, config=CONFIG, tokenizer=TOKENIZER),
}
"""How a pre-training's snapshots are written."""


@dataclass(frozen=True)
class Training:
    """A small training whose every step depends on its state and its number alone."""

    state: TrainState

    def run(self, *steps: int) -> None:
        """Take steps with dropout, random pairs, a moving learning rate and a gradient clip."""
        state = self.state
        for step in steps:
            torch.manual_seed(step)
            batch = random_batch()
            state.student.clamp_temperature()
            state.teacher.follow(state.student, momentum=0.9)
            outcome = pretraining_step(
                state.student, state.teacher, state.queues, batch, alpha=0.4, recipe=CONFIG.recipe
            )
            state.optimizer.zero_grad()
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(state.student.parameters(), CONFIG.optim.clip_norm)
            for group in state.optimizer.param_groups:
                group["lr"] = CONFIG.optim.lr / (1 + step)
            state.optimizer.step()
            state.queues.push(
                outcome.teacher_image_features, outcome.teacher_text_features, batch.image_ids
            )

    def everything(self) -> dict[str, Any]:
        """Give all that a step reads or writes, by name."""
        state = self.state
        modules = {"student": state.student, "teacher": state.teacher, "queues": state.queues}
        saved = state.optimizer.state_dict()
        found = {
            f"{part} {name}": tensor.clone()
            for part, module in modules.items()
            for name, tensor in module.state_dict().items()
        }
        found |= {
            f"optimizer {index} {name}": tensor.clone()
            for index, moments in saved["state"].items()
            for name, tensor in moments.items()
        }
        return found | {"groups": [dict(group) for group in saved["param_groups"]]}


def random_batch() -> PairBatch:
    words = torch.randint(5, TOKENIZER.vocab_size, (NUM_PAIRS, NUM_TOKENS))
    hidden = torch.arange(NUM_TOKENS) == 2
    return PairBatch(
        images=torch.randn(NUM_PAIRS, 3, 16, 16),
        token_ids=words,
        attention_mask=torch.ones_like(words, dtype=torch.bool),
        masked_ids=words.masked_fill(hidden, 4),
        mlm_labels=words.masked_fill(~hidden, -100),
        image_ids=torch.randint(0, 1000, (NUM_PAIRS,)),
    )


def new_training(*, seed: int = 0, config: PretrainConfig = CONFIG) -> Training:
    torch.manual_seed(seed)
    student = ALBEF(config.model)
    state = TrainState(
        student=student,
        teacher=Teacher(config.model, student),
        queues=Queues(config.model, config.objective, config.recipe),
        optimizer=adamw(student, config.optim, decay_weights_only=True),
    )
    return Training(state)


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not is_same(one[name], other[name])] == []


def is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return one == other
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*as_bytes)


def write(snapshotter: Snapshotter, folder: Path) -> Path:
    write_snapshot(snapshotter.take(), folder, **AS_PRETRAINED)
    return folder


def test_a_training_restored_into_new_objects_goes_on_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = new_training()
    snapshotter = Snapshotter(undisturbed.state)
    undisturbed.run(0, 1, 2)
    folder = write(snapshotter, tmp_path / "checkpoint")
    at_three = undisturbed.everything()
    undisturbed.run(3, 4, 5)

    resumed = new_training(seed=9)
    restore(folder, resumed.state)
    assert_same_bits(resumed.everything(), at_three)
    resumed.run(3, 4, 5)

    assert_same_bits(resumed.everything(), undisturbed.everything())


def test_a_training_without_a_teacher_is_restored_too(tmp_path: Path) -> None:
    training = new_training()
    training.run(0)
    alone = replace(training.state, teacher=None, queues=None)
    folder = write(Snapshotter(alone), tmp_path / "checkpoint")
    assert not (folder / "teacher.safetensors").exists()

    resumed = new_training(seed=9)
    restore(folder, replace(resumed.state, teacher=None, queues=None))

    for name, weight in training.state.student.state_dict().items():
        assert torch.equal(resumed.state.student.state_dict()[name], weight), name


def test_a_snapshot_does_not_see_the_steps_after_it(tmp_path: Path) -> None:
    training = new_training()
    snapshotter = Snapshotter(training.state)
    training.run(0, 1)
    before, snapshot = training.everything(), snapshotter.take()
    training.run(2)
    write_snapshot(snapshot, tmp_path / "checkpoint", **AS_PRETRAINED)

    resumed = new_training(seed=9)
    restore(tmp_path / "checkpoint", resumed.state)

    assert_same_bits(resumed.everything(), before)


def test_one_snapshotter_serves_many_checkpoints_in_the_same_memory(tmp_path: Path) -> None:
    training = new_training()
    snapshotter = Snapshotter(training.state)
    places = set()

    for step in range(3):
        training.run(step)
        snapshot = snapshotter.take()
        tensors = [*snapshot.student.parameters(), *snapshot.optimizer["state"][0].values()]
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
        folder = tmp_path / str(step)
        write_snapshot(snapshot, folder, **AS_PRETRAINED)
        resumed = new_training(seed=9)
        restore(folder, resumed.state)
        assert_same_bits(resumed.everything(), training.everything())

    assert len(places) == 1


def test_a_checkpoint_before_the_first_step_is_one_too(tmp_path: Path) -> None:
    training = new_training()
    folder = write(Snapshotter(training.state), tmp_path / "checkpoint")

    resumed = new_training(seed=9)
    restore(folder, resumed.state)

    assert_same_bits(resumed.everything(), training.everything())


def test_a_checkpoint_written_while_training_goes_on_is_that_of_its_step(tmp_path: Path) -> None:
    training = new_training()
    snapshotter = Snapshotter(training.state)
    training.run(0)
    before, snapshot = training.everything(), snapshotter.take()
    writing = threading.Thread(
        target=write_snapshot,
        args=(snapshot, tmp_path / "checkpoint"),
        kwargs=AS_PRETRAINED,
    )

    writing.start()
    training.run(1, 2)
    writing.join()

    resumed = new_training(seed=9)
    restore(tmp_path / "checkpoint", resumed.state)
    assert_same_bits(resumed.everything(), before)


def test_writing_a_snapshot_that_the_next_one_overtook_is_refused(tmp_path: Path) -> None:
    snapshotter = Snapshotter(new_training().state)
    first = snapshotter.take()
    snapshotter.take()

    with pytest.raises(RuntimeError, match="wait for the writer"):
        write_snapshot(first, tmp_path / "checkpoint", **AS_PRETRAINED)


def test_a_checkpoint_is_a_model_folder(tmp_path: Path) -> None:
    training = new_training()
    training.run(0)
    folder = write(Snapshotter(training.state), tmp_path / "checkpoint")

    loaded = load_model(folder)

    assert loaded.model_config == CONFIG.model
    student = training.state.student.state_dict()
    assert all(torch.equal(student[name], v) for name, v in loaded.model.state_dict().items())


def longer_queue(config: PretrainConfig) -> PretrainConfig:
    return replace(config, objective=replace(config.objective, num_slots=NUM_SLOTS + 1))


def wider_text(config: PretrainConfig) -> PretrainConfig:
    return replace(config, model=replace(config.model, text_width=32))


@pytest.mark.parametrize("change", [longer_queue, wider_text])
def test_a_training_of_other_sizes_is_refused(
    change: Callable[[PretrainConfig], PretrainConfig], tmp_path: Path
) -> None:
    folder = write(Snapshotter(new_training().state), tmp_path / "checkpoint")

    with pytest.raises(InputError, match="does not fit"):
        restore(folder, new_training(config=change(CONFIG)).state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_snapshot_of_a_gpu_lies_in_pinned_memory_and_holds_the_same_bits() -> None:
    training = new_training()
    for module in (training.state.student, training.state.teacher, training.state.queues):
        module.cuda()

    snapshot = Snapshotter(training.state).take()

    for name, tensor in snapshot.student.state_dict().items():
        assert tensor.is_pinned()
        assert is_same(tensor, training.state.student.state_dict()[name].cpu())
