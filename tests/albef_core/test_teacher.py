from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.teacher import Teacher, alpha_at, follow, frozen_copy, with_weights_of
from tests.albef_core import literal
from tests.albef_core.replay import read_json
from tests.golden_folder import GOLDEN, needs_golden

OUTSIDE_THE_TEACHER = {"temperature", "itm_head.weight", "itm_head.bias"}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.995, 1.0])
def test_every_weight_moves_by_the_moving_average(
    tiny_config: ModelConfig,
    tiny_model: ALBEF,
    make_model: Callable[..., ALBEF],
    momentum: float,
) -> None:
    teacher = Teacher(tiny_config, make_model(seed=1)).double()
    student = tiny_model.double()
    old = {name: value.clone().numpy() for name, value in teacher.named_parameters()}
    teacher.follow(student, momentum=momentum)
    new = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        expected = literal.moving_average(old[name], new[name].detach().numpy(), momentum=momentum)
        # Ours interpolates from the old weight, which rounds otherwise than two products.
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-15, err_msg=name)


def test_teacher_averages_all_but_the_matching_head_and_the_temperature(
    tiny_model: ALBEF, tiny_teacher: Teacher
) -> None:
    students = {name for name, _ in tiny_model.named_parameters()}
    assert {name for name, _ in tiny_teacher.named_parameters()} == students - OUTSIDE_THE_TEACHER


def test_teacher_starts_as_its_student(tiny_config: ModelConfig, tiny_model: ALBEF) -> None:
    teacher = Teacher(tiny_config, tiny_model)
    theirs = tiny_model.state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_teacher_owns_its_weights_and_takes_no_gradient(
    tiny_model: ALBEF, tiny_teacher: Teacher
) -> None:
    theirs = {parameter.data_ptr() for parameter in tiny_model.parameters()}
    for name, parameter in tiny_teacher.named_parameters():
        assert parameter.data_ptr() not in theirs, name
        assert not parameter.requires_grad, name


def test_following_leaves_the_student_as_it_was(tiny_model: ALBEF, tiny_teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_teacher.follow(tiny_model, momentum=0.9)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_tied_decoder_stays_tied_and_moves_once(
    tiny_config: ModelConfig, tiny_model: ALBEF, make_model: Callable[..., ALBEF]
) -> None:
    teacher = Teacher(tiny_config, make_model(seed=1))
    old = teacher.text_encoder.word_embeddings.weight.clone()
    teacher.follow(tiny_model, momentum=0.5)
    words = teacher.text_encoder.word_embeddings.weight
    assert teacher.mlm_head.decoder.weight is words
    torch.testing.assert_close(words, (old + tiny_model.text_encoder.word_embeddings.weight) / 2)


@given(ramp_steps=st.integers(1, 1000), step=st.integers(0, 3000), alpha=st.floats(0, 1, width=32))
def test_alpha_rises_in_a_line_from_zero_and_then_stays(
    ramp_steps: int, step: int, alpha: float
) -> None:
    expected = alpha * step / ramp_steps if step < ramp_steps else alpha
    assert alpha_at(step, alpha=alpha, ramp_steps=ramp_steps) == pytest.approx(expected)


def test_without_a_ramp_alpha_is_whole_from_the_start() -> None:
    assert alpha_at(0, alpha=0.4, ramp_steps=0) == 0.4


@needs_golden
def test_alpha_equals_the_recorded_one_at_every_iteration() -> None:
    num_compared = 0
    for name, run in read_json(GOLDEN / "schedule" / "lr.json").items():
        has_ramp = run["warm_up"] is not False
        for epochs in run["cases"].values():
            steps_per_epoch = epochs[0]["iterations"]
            for recorded in epochs:
                values = recorded.get("alpha_at") or dict(enumerate(recorded.get("alpha", [])))
                for iteration, alpha in values.items():
                    step = recorded["epoch"] * steps_per_epoch + int(iteration)
                    ramp = steps_per_epoch if has_ramp else 0
                    assert alpha_at(step, alpha=run["alpha"], ramp_steps=ramp) == alpha, name
                    num_compared += 1
    assert num_compared > 0


def test_a_frozen_copy_is_the_student_without_gradient_and_shares_nothing_with_it() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    student[1].weight = student[0].weight
    teacher = frozen_copy(student)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
        assert value.data_ptr() != student.state_dict()[name].data_ptr(), name
    assert teacher[1].weight is teacher[0].weight  # what is shared in one is shared in the other
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_shared_weight_follows_once_a_step() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    student[1].weight = student[0].weight
    teacher = frozen_copy(student)
    torch.nn.init.zeros_(teacher[0].weight)
    torch.nn.init.ones_(student[0].weight)
    follow(teacher, student, momentum=0.75)
    assert torch.equal(teacher[1].weight, torch.full((2, 2), 0.25))


def test_a_measured_teacher_is_a_student_but_for_what_is_not_distilled(
    tiny_model: ALBEF, tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    teacher = Teacher(tiny_config, make_model(seed=1))
    student = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    copy = with_weights_of(teacher, tiny_model).state_dict()
    theirs = teacher.state_dict()
    for name, value in copy.items():
        assert torch.equal(value, student[name] if name in OUTSIDE_THE_TEACHER else theirs[name])
    assert all(torch.equal(tiny_model.state_dict()[name], value) for name, value in student.items())
