"""Entailment and NLVR2 agree with the official code, keep rows apart, and drop out by key."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.teacher import follow, frozen_copy
from albef_core.weights import apply_weights
from tests.albef_core.replay import named, read_json
from tests.albef_core.tasks.classified import DTYPES, TASKS, Task, recorded_logits, replay
from tests.albef_core.tasks.recording import (
    LIMITS,
    SUMS_LIMIT,
    as_official,
    check_gradients,
    full_size,
    num_parameters,
)
from tests.albef_core.test_official import FULL_SIZE, shapes
from tests.albef_core.test_pretraining_golden import assert_near, check_sums
from tests.golden_folder import needs_golden


@needs_golden
@DTYPES
@TASKS
def test_a_step_agrees_with_the_official_one(task: Task, dtype: torch.dtype) -> None:
    recording, student, teacher = replay(task, dtype)
    recorded, scalars = recording.tensors, recording.scalars
    follow(teacher, student, momentum=recording.config["momentum"])
    step = task.step(student, teacher, task.recorded(recorded, dtype), alpha=scalars["alpha"])
    step.loss.backward()
    loss = scalars["loss_float64" if dtype == torch.float64 else "loss"]
    assert step.loss.item() == pytest.approx(loss, rel=LIMITS[dtype])
    assert_near(step.logits, recorded["prediction"], 1e-4, "prediction")
    assert_near(step.teacher_logits, recorded["prediction_m"], 1e-4, "prediction_m")
    check_gradients(student, recording.by_our_names(scalars["grad_norm"]), torch.float32)
    sums = recording.by_our_names(scalars["momentum_after_sums"])
    sums = {name.removeprefix("teacher."): value for name, value in sums.items()}
    assert sums.keys() == named(teacher).keys()
    check_sums(named(teacher), sums, SUMS_LIMIT, 0.0)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@needs_golden
@DTYPES
@TASKS
@pytest.mark.parametrize("variant", ["loss_no_distill", "loss_alpha0"])
def test_without_distillation_the_loss_agrees(task: Task, dtype: torch.dtype, variant: str) -> None:
    recording, student, teacher = replay(task, dtype)
    step = task.step(student, teacher, task.recorded(recording.tensors, dtype), alpha=0.0)
    assert step.loss.item() == pytest.approx(recording.scalars[variant], rel=1e-5)


@needs_golden
@DTYPES
@TASKS
def test_the_evaluation_agrees(task: Task, dtype: torch.dtype) -> None:
    recording, student, _ = replay(task, dtype)
    batch = task.recorded(recording.tensors, dtype)
    expected = recorded_logits(recording, dtype)
    inputs = batch.images, batch.token_ids, batch.attention_mask
    assert_near(student.eval()(*inputs), expected, LIMITS[dtype], "logits")
    shares = expected.softmax(dim=1)
    shares = shares if shares.shape[1] > 2 else shares[:, 1]  # NLVR2 tells that of "true"
    assert_near(task.predict(student, *inputs), shares, LIMITS[dtype], "probabilities")


@needs_golden
@TASKS
def test_an_official_checkpoint_at_full_size_loads_and_saves_key_for_key(task: Task) -> None:
    recorded, sizes = full_size(task.folder)
    with torch.device("meta"):
        student = task.make(sizes)
        teacher = frozen_copy(student)
    assert shapes(as_official(student, teacher, like=recorded)) == shapes(recorded)
    both = nn.ModuleDict({**dict(student.named_children()), "teacher": teacher})
    report = apply_weights(both, from_official(recorded), source=task.folder)
    assert not report.missing
    assert not report.unexpected
    counts = read_json(FULL_SIZE / "models.json")[task.folder]
    assert num_parameters(student) == counts["parameters_trainable"]
    assert num_parameters(student, teacher) == counts["parameters_unique"]


@TASKS
def test_a_model_of_other_sizes_is_refused(
    task: Task, tiny_config: ModelConfig, tiny_model: ALBEF
) -> None:
    student = task.make(replace(tiny_config, fusion_layers=2))
    with pytest.raises(InputError, match="here: does not fit the model"):
        task.start(student, tiny_model.state_dict(), source="here")


@TASKS
def test_rows_do_not_see_each_other_and_padding_changes_nothing(
    task: Task, tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    model, batch = randomize(task.make(tiny_config)).eval(), task.small(pairs)
    together = task.predict(model, batch.images, batch.token_ids, batch.attention_mask)
    for row, expected in enumerate(together):
        length = int(batch.attention_mask[row].sum())
        texts = batch.token_ids[row, None, :length], batch.attention_mask[row, None, :length]
        torch.testing.assert_close(
            task.predict(model, batch.images[row, None], *texts)[0], expected
        )
    assert (together[0] - together[1]).abs().max() > 1e-3


@TASKS
def test_dropout_depends_on_seed_and_place_and_not_on_the_micro_batch(
    task: Task, tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    student = randomize(task.make(replace(tiny_config, dropout=0.3)))
    teacher, batch = frozen_copy(student), task.small(pairs)

    def logits(**options: int) -> Tensor:
        step = task.step(student, teacher, batch, alpha=0.4, **options)
        assert (step.logits - step.teacher_logits).abs().max() > 1e-3  # masks of their own
        return step.logits

    torch.testing.assert_close(logits(seed=1), logits(seed=1, micro_batch_size=3))
    assert (logits(seed=1) - logits(seed=2)).abs().max() > 1e-3


@TASKS
@pytest.mark.parametrize("num_rows", [1, 4])
def test_every_weight_of_the_student_learns_and_none_of_the_teacher(
    task: Task,
    num_rows: int,
    tiny_config: ModelConfig,
    make_pairs: Callable[..., PairBatch],
    randomize: Callable,
) -> None:
    student = randomize(task.make(tiny_config))
    teacher, batch = frozen_copy(student), task.small(make_pairs(range(num_rows)))
    step = task.step(student, teacher, batch, alpha=0.4)
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
