"""NLVR2 agrees with the official code; its teacher starts where the recipe says."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, Recipe, corrected, paper_2021
from albef_core.model import ALBEF
from albef_core.official import from_official
from albef_core.pair_encoder import in_pairs
from albef_core.tasks.nlvr2 import Nlvr2Model, start_nlvr2, verify
from albef_core.tasks.text_assignment import AssignmentModel
from albef_core.teacher import Teacher, frozen_copy
from tests.albef_core.replay import named, read_json
from tests.albef_core.tasks.classified import DTYPES, NLVR2, replay
from tests.albef_core.tasks.recording import (
    Recording,
    full_size,
    our_names,
)
from tests.albef_core.test_official import FULL_SIZE, recorded_states
from tests.albef_core.test_pretraining_golden import assert_near
from tests.golden_folder import GOLDEN, needs_golden


@needs_golden
@DTYPES
def test_what_the_sentence_has_seen_agrees_with_the_official_code(dtype: torch.dtype) -> None:
    recording, student, _ = replay(NLVR2, dtype)
    assert isinstance(student, Nlvr2Model)
    batch = NLVR2.recorded(recording.tensors, dtype)
    fused = student.fuse(batch.images, batch.token_ids, batch.attention_mask)
    assert_near(fused, recording.tensors["last_hidden_state"], 1e-4, "last_hidden_state")


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


def test_the_order_of_the_images_counts(
    tiny_config: ModelConfig, pairs: PairBatch, randomize: Callable
) -> None:
    model, batch = randomize(Nlvr2Model(tiny_config)).eval(), NLVR2.small(pairs)
    texts = batch.token_ids, batch.attention_mask
    turned = verify(model, batch.images.flip(1), *texts)
    assert (turned - verify(model, batch.images, *texts)).abs().max() > 1e-3
