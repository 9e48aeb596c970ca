"""NLVR2 agrees with the official code; its teacher starts where the recipe says."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, Recipe, corrected, paper_2021
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.pair_encoder import in_pairs
from albef_core.tasks.nlvr2 import Nlvr2Batch, Nlvr2Model, nlvr2_step, start_nlvr2, verify
from albef_core.tasks.text_assignment import AssignmentModel
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


def replay(dtype: torch.dtype) -> tuple[Recording, Nlvr2Model, Nlvr2Model]:
    recording = Recording(GOLDEN / "nlvr")
    student = Nlvr2Model(recording.sizes)
    teacher = frozen_copy(student)
    recording.load(student=student, teacher=teacher)
    return recording, student.to(dtype), teacher.to(dtype)


def batch_of(recorded: dict[str, Tensor], dtype: torch.dtype) -> Nlvr2Batch:
    first, second = recorded["images"].chunk(2)  # all first images, then all second ones
    return Nlvr2Batch(
        images=torch.stack([first, second], dim=1).to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        labels=recorded["targets"],
    )


@needs_golden
@DTYPES
def test_a_step_agrees_with_the_official_one(dtype: torch.dtype) -> None:
    recording, student, teacher = replay(dtype)
    recorded, scalars = recording.tensors, recording.scalars
    batch = batch_of(recorded, dtype)
    follow(teacher, student, momentum=recording.config["momentum"])
    step = nlvr2_step(student, teacher, batch, alpha=scalars["alpha"])
    step.loss.backward()
    loss = scalars["loss_float64" if dtype == torch.float64 else "loss"]
    assert step.loss.item() == pytest.approx(loss, rel=LIMITS[dtype])
    assert_near(step.logits, recorded["prediction"], 1e-4, "prediction")
    assert_near(step.teacher_logits, recorded["prediction_m"], 1e-4, "prediction_m")
    fused = student.fuse(batch.images, batch.token_ids, batch.attention_mask)
    assert_near(fused, recorded["last_hidden_state"], 1e-4, "last_hidden_state")
    check_gradients(student, recording.by_our_names(scalars["grad_norm"]), torch.float32)
    sums = recording.by_our_names(scalars["momentum_after_sums"])
    sums = {name.removeprefix("teacher."): value for name, value in sums.items()}
    assert sums.keys() == named(teacher).keys()
    check_sums(named(teacher), sums, SUMS_LIMIT, 0.0)


@needs_golden
@DTYPES
@pytest.mark.parametrize("variant", ["loss_no_distill", "loss_alpha0"])
def test_without_distillation_the_loss_agrees(dtype: torch.dtype, variant: str) -> None:
    recording, student, teacher = replay(dtype)
    batch = batch_of(recording.tensors, dtype)
    step = nlvr2_step(student, teacher, batch, alpha=0.0)
    assert step.loss.item() == pytest.approx(recording.scalars[variant], rel=1e-5)


@needs_golden
@DTYPES
def test_the_evaluation_agrees(dtype: torch.dtype) -> None:
    recording, student, _ = replay(dtype)
    batch = batch_of(recording.tensors, dtype)
    recorded = recording.tensors["eval_logits"]
    if dtype == torch.float64:
        recorded = torch.tensor(recording.scalars["eval_logits_float64"], dtype=dtype)
    logits = student.eval()(batch.images, batch.token_ids, batch.attention_mask)
    assert_near(logits, recorded, LIMITS[dtype], "logits")
    probabilities = verify(student, batch.images, batch.token_ids, batch.attention_mask)
    assert_near(probabilities, recorded.softmax(dim=1)[:, 1], LIMITS[dtype], "probabilities")


@needs_golden
def test_the_tied_parameters_are_the_official_ones() -> None:
    recording = Recording(GOLDEN / "nlvr")
    student = Nlvr2Model(recording.sizes)
    models = nn.ModuleDict({**dict(student.named_children()), "teacher": frozen_copy(student)})
    names: dict[int, set[str]] = {}
    for name, parameter in models.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    tied = [group for group in names.values() if len(group) > 1]
    recorded = [
        set(recording.by_our_names(dict.fromkeys(g))) for g in recording.config["tied_keys"]
    ]
    assert sorted(map(sorted, tied)) == sorted(map(sorted, recorded))
    unique = recording.by_our_names(dict.fromkeys(recording.config["parameter_names"]))
    assert unique.keys() == {name for name, _ in models.named_parameters()}


@needs_golden
def test_an_official_checkpoint_at_full_size_loads_and_saves_key_for_key() -> None:
    recorded, sizes = full_size("nlvr")
    with torch.device("meta"):
        student = Nlvr2Model(sizes)
        teacher = frozen_copy(student)
    assert shapes(as_official(student, teacher, like=recorded)) == shapes(recorded)
    both = nn.ModuleDict({**dict(student.named_children()), "teacher": teacher})
    report = apply_weights(both, from_official(recorded), source="nlvr")
    assert not report.missing
    assert not report.unexpected
    counts = read_json(FULL_SIZE / "models.json")["nlvr"]
    assert num_parameters(student) == counts["parameters_trainable"]
    assert num_parameters(student, teacher) == counts["parameters_unique"]


@needs_golden
def test_text_assignment_starts_what_it_starts_in_the_official_code() -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")["nlvr_from_nlvr_pretrain"]
    assert all(key == source for key, source in conversion["loaded"].items())
    _, sizes = full_size("nlvr")
    with torch.device("meta"):
        student = Nlvr2Model(sizes)
    assigned = from_official(recorded_states()["nlvr_pretrain"])
    _, report = start_nlvr2(student, assigned, source="nlvr_pretrain", recipe=paper_2021())
    missing = {n for n in our_names(conversion["missing"]) if not n.startswith("teacher.")}
    assert set(report.missing) == missing
    assert set(report.unexpected) == our_names(conversion["unexpected"])
    state = {name for name in student.state_dict() if not name.startswith("classifier.")}
    assert state == our_names(conversion["loaded"])


@pytest.mark.parametrize("recipe", [corrected(), paper_2021()], ids=["corrected", "paper-2021"])
def test_the_teacher_starts_loaded_or_as_published_from_the_weights_before(
    tiny_config: ModelConfig, tiny_model: ALBEF, recipe: Recipe
) -> None:
    student = Nlvr2Model(tiny_config)
    before = {name: value.clone() for name, value in named(student).items()}
    pretrained = tiny_model.state_dict()
    teacher, _ = start_nlvr2(student, pretrained, source="here", recipe=recipe)
    expected = named(student) if recipe == corrected() else before
    for name, value in named(teacher).items():
        assert torch.equal(value, expected[name]), name
        assert not value.requires_grad
    paired = in_pairs(pretrained)
    for name, value in named(student).items():
        assert torch.equal(value, paired.get(name, before[name])), name


def test_it_starts_from_pre_training_with_each_layer_twice_or_from_text_assignment(
    tiny_config: ModelConfig, tiny_model: ALBEF, tiny_teacher: Teacher, randomize: Callable
) -> None:
    pretrained = dict(tiny_model.state_dict())
    pretrained |= {f"teacher.{name}": v for name, v in tiny_teacher.state_dict().items()}
    student = Nlvr2Model(tiny_config)
    _, report = start_nlvr2(student, pretrained, source="here", recipe=corrected())
    heads = {name for name in named(student) if name.startswith("classifier.")}
    assert set(report.missing) == heads
    first, second = student.multimodal_encoder.layers
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert torch.equal(value, pretrained[f"multimodal_encoder.layers.0.{name}"]), name
    assigned = randomize(AssignmentModel(tiny_config)).state_dict()
    _, report = start_nlvr2(student, assigned, source="here", recipe=corrected())
    assert set(report.missing) == heads
    for name, value in student.state_dict().items():
        assert name in report.missing or torch.equal(value, assigned[name]), name


def test_a_model_of_other_sizes_is_refused(tiny_config: ModelConfig, tiny_model: ALBEF) -> None:
    student = Nlvr2Model(replace(tiny_config, fusion_layers=2))
    with pytest.raises(InputError, match="here: does not fit the model"):
        start_nlvr2(student, tiny_model.state_dict(), source="here", recipe=corrected())


@pytest.fixture
def batch(pairs: PairBatch) -> Nlvr2Batch:
    return Nlvr2Batch(
        images=torch.stack([pairs.images, pairs.images.flip(0)], dim=1),
        token_ids=pairs.token_ids,
        attention_mask=pairs.attention_mask,
        labels=torch.arange(len(pairs)) % 2,
    )


def test_rows_do_not_see_each_other_and_the_order_of_images_counts(
    tiny_config: ModelConfig, batch: Nlvr2Batch, randomize: Callable
) -> None:
    model = randomize(Nlvr2Model(tiny_config)).eval()
    together = verify(model, batch.images, batch.token_ids, batch.attention_mask)
    for row, expected in enumerate(together):
        length = int(batch.attention_mask[row].sum())
        texts = batch.token_ids[row, None, :length], batch.attention_mask[row, None, :length]
        torch.testing.assert_close(verify(model, batch.images[row, None], *texts)[0], expected)
    turned = verify(model, batch.images.flip(1), batch.token_ids, batch.attention_mask)
    assert (turned - together).abs().max() > 1e-3


def test_dropout_depends_on_seed_and_place_and_not_on_the_micro_batch(
    tiny_config: ModelConfig, batch: Nlvr2Batch, randomize: Callable
) -> None:
    student = randomize(Nlvr2Model(replace(tiny_config, dropout=0.3)))
    teacher = frozen_copy(student)

    def logits(**options: int) -> Tensor:
        return nlvr2_step(student, teacher, batch, alpha=0.4, **options).logits

    torch.testing.assert_close(logits(seed=1), logits(seed=1, micro_batch_size=3))
    assert (logits(seed=1) - logits(seed=2)).abs().max() > 1e-3


def test_every_weight_of_the_student_learns_and_none_of_the_teacher(
    tiny_config: ModelConfig, batch: Nlvr2Batch, randomize: Callable
) -> None:
    student = randomize(Nlvr2Model(tiny_config))
    teacher = frozen_copy(student)
    nlvr2_step(student, teacher, batch, alpha=0.4).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
