"""Entailment agrees with the official code, starts from pre-training, and keeps rows apart."""

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
from albef_core.tasks.entailment import (
    EntailmentBatch,
    EntailmentModel,
    entail,
    entailment_step,
    start_entailment,
)
from albef_core.tasks.labels import ENTAILMENT_LABELS
from albef_core.teacher import Teacher, follow, frozen_copy
from albef_core.weights import apply_weights
from tests.albef_core.replay import named, read_json
from tests.albef_core.tasks.recording import (
    LIMITS,
    SUMS_LIMIT,
    Recording,
    as_official,
    check_gradients,
    full_size,
    num_parameters,
    our_names,
)
from tests.albef_core.test_official import FULL_SIZE, recorded_states, shapes
from tests.albef_core.test_pretraining_golden import assert_near, check_sums
from tests.golden_folder import GOLDEN, needs_golden

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def replay(dtype: torch.dtype) -> tuple[Recording, EntailmentModel, EntailmentModel]:
    recording = Recording(GOLDEN / "ve")
    student = EntailmentModel(recording.sizes)
    teacher = frozen_copy(student)
    recording.load(student=student, teacher=teacher)
    return recording, student.to(dtype), teacher.to(dtype)


def batch_of(recorded: dict[str, Tensor], dtype: torch.dtype) -> EntailmentBatch:
    return EntailmentBatch(
        images=recorded["image"].to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        labels=recorded["targets"],
    )


@needs_golden
@DTYPES
def test_a_step_agrees_with_the_official_one(dtype: torch.dtype) -> None:
    recording, student, teacher = replay(dtype)
    recorded, scalars = recording.tensors, recording.scalars
    follow(teacher, student, momentum=recording.config["momentum"])
    step = entailment_step(
        student,
        teacher,
        batch_of(recorded, dtype),
        alpha=scalars["alpha"],
    )
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
@pytest.mark.parametrize("variant", ["loss_no_distill", "loss_alpha0"])
def test_without_distillation_the_loss_agrees(dtype: torch.dtype, variant: str) -> None:
    recording, student, teacher = replay(dtype)
    batch = batch_of(recording.tensors, dtype)
    step = entailment_step(student, teacher, batch, alpha=0.0)
    assert step.loss.item() == pytest.approx(recording.scalars[variant], rel=1e-5)


@needs_golden
@DTYPES
def test_the_evaluation_agrees(dtype: torch.dtype) -> None:
    recording, student, _ = replay(dtype)
    batch = batch_of(recording.tensors, dtype)
    probabilities = entail(student.eval(), batch.images, batch.token_ids, batch.attention_mask)
    recorded = recording.tensors["eval_logits"]
    if dtype == torch.float64:
        recorded = torch.tensor(recording.scalars["eval_logits_float64"], dtype=dtype)
    assert_near(probabilities, recorded.softmax(dim=1), LIMITS[dtype], "probabilities")
    logits = student(batch.images, batch.token_ids, batch.attention_mask)
    assert_near(logits, recorded, LIMITS[dtype], "logits")


@needs_golden
def test_an_official_checkpoint_at_full_size_loads_and_saves_key_for_key() -> None:
    recorded, sizes = full_size("ve")
    with torch.device("meta"):
        student = EntailmentModel(sizes)
        teacher = frozen_copy(student)
    assert shapes(as_official(student, teacher, like=recorded)) == shapes(recorded)
    both = nn.ModuleDict({**dict(student.named_children()), "teacher": teacher})
    report = apply_weights(both, from_official(recorded), source="ve")
    assert not report.missing
    assert not report.unexpected
    counts = read_json(FULL_SIZE / "models.json")["ve"]
    assert num_parameters(student) == counts["parameters_trainable"]
    assert num_parameters(student, teacher) == counts["parameters_unique"]


@needs_golden
def test_pre_trained_weights_start_what_they_start_in_the_official_code() -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")["ve"]
    _, sizes = full_size("ve")
    with torch.device("meta"):
        student = EntailmentModel(sizes)
    pretrained = from_official(recorded_states()["pretrain"])
    teacher, report = start_entailment(student, pretrained, source="pretrain")
    assert report.matched == len(our_names(conversion["loaded"]))
    missing = our_names(conversion["missing"])
    assert set(report.missing) == missing
    assert set(report.unexpected) == our_names(conversion["unexpected"])
    started = set(named(student)) | {f"teacher.{name}" for name in named(teacher)}
    assert started - missing == our_names(conversion["loaded"])


@pytest.fixture
def pretrained(tiny_model: ALBEF, tiny_teacher: Teacher) -> dict[str, Tensor]:
    state = dict(tiny_model.state_dict())
    return state | {f"teacher.{name}": value for name, value in tiny_teacher.state_dict().items()}


def test_student_and_teacher_start_from_their_pre_trained_selves(
    tiny_config: ModelConfig, pretrained: dict[str, Tensor]
) -> None:
    student = EntailmentModel(tiny_config)
    head = {name: value.clone() for name, value in student.classifier.state_dict().items()}
    teacher, report = start_entailment(student, pretrained, source="here")
    for prefix, model in (("", student), ("teacher.", teacher)):
        for name, value in named(model).items():
            own = name.removeprefix("classifier.")
            expected = head[own] if own in head else pretrained[prefix + name]
            assert torch.equal(value, expected), prefix + name
    heads = [f"classifier.{name}" for name in head]
    assert set(report.missing) == {*heads, *(f"teacher.{name}" for name in heads)}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_without_a_pre_trained_teacher_it_starts_as_its_student(
    tiny_config: ModelConfig, tiny_model: ALBEF
) -> None:
    student = EntailmentModel(tiny_config)
    teacher, _ = start_entailment(student, tiny_model.state_dict(), source="here")
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_larger_pictures_get_interpolated_positions_in_both(
    tiny_config: ModelConfig, pretrained: dict[str, Tensor]
) -> None:
    student = EntailmentModel(replace(tiny_config, image_size=2 * tiny_config.image_size))
    teacher, _ = start_entailment(student, pretrained, source="here")
    for prefix, model in (("", student), ("teacher.", teacher)):
        small = pretrained[f"{prefix}image_encoder.pos_embed"]
        large = model.image_encoder.pos_embed
        assert large.shape[1] - 1 == 4 * (small.shape[1] - 1)
        assert torch.equal(large[:, 0], small[:, 0])


def test_a_model_of_other_sizes_is_refused(
    tiny_config: ModelConfig, pretrained: dict[str, Tensor]
) -> None:
    student = EntailmentModel(replace(tiny_config, fusion_layers=2))
    with pytest.raises(InputError, match="here: does not fit the model"):
        start_entailment(student, pretrained, source="here")


def entailment_batch(pairs: PairBatch) -> EntailmentBatch:
    return EntailmentBatch(
        images=pairs.images,
        token_ids=pairs.token_ids,
        attention_mask=pairs.attention_mask,
        labels=torch.arange(len(pairs)) % len(ENTAILMENT_LABELS),
    )


def test_rows_do_not_see_each_other_and_padding_changes_nothing(
    tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    model, batch = randomize(EntailmentModel(tiny_config)).eval(), entailment_batch(pairs)
    together = entail(model, batch.images, batch.token_ids, batch.attention_mask)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(len(batch)))
    for row, expected in enumerate(together):
        length = int(batch.attention_mask[row].sum())
        texts = batch.token_ids[row, None, :length], batch.attention_mask[row, None, :length]
        alone = entail(model, batch.images[row, None], *texts)
        torch.testing.assert_close(alone[0], expected)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_batch_of_one_is_trained_on(
    tiny_config: ModelConfig, make_pairs: Callable[..., PairBatch], randomize: Callable
) -> None:
    student = randomize(EntailmentModel(tiny_config))
    batch = entailment_batch(make_pairs([3]))
    step = entailment_step(student, frozen_copy(student), batch, alpha=0.4)
    step.loss.backward()
    assert step.loss.isfinite()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_dropout_depends_on_seed_and_place_and_not_on_the_micro_batch(
    tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    student = randomize(EntailmentModel(replace(tiny_config, dropout=0.3)))
    teacher, batch = frozen_copy(student), entailment_batch(pairs)

    def logits(**options: int) -> Tensor:
        step = entailment_step(student, teacher, batch, alpha=0.4, **options)
        assert (step.logits - step.teacher_logits).abs().max() > 1e-3  # masks of their own
        return step.logits

    torch.testing.assert_close(logits(seed=1), logits(seed=1, micro_batch_size=3))
    assert (logits(seed=1) - logits(seed=2)).abs().max() > 1e-3
