"""Entailment starts from pre-training as in the official code: student and teacher."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.tasks.entailment import (
    EntailmentModel,
    entail,
    start_entailment,
)
from albef_core.teacher import Teacher
from tests.albef_core.replay import named, read_json
from tests.albef_core.tasks.recording import (
    full_size,
    our_names,
)
from tests.albef_core.test_official import FULL_SIZE, recorded_states
from tests.golden_folder import needs_golden


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


def test_the_probabilities_of_the_three_classes_sum_to_one(
    tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    model = randomize(EntailmentModel(tiny_config)).eval()
    shares = entail(model, pairs.images, pairs.token_ids, pairs.attention_mask)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(pairs)))
