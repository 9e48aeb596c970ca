"""One step of VQA: its loss, its teacher, its start, and that company and chunks change nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tasks.vqa import (
    VqaModel,
    VqaStep,
    answer_losses,
    from_pretraining,
    start_from_pretraining,
    vqa_step,
)
from albef_core.teacher import Teacher, follow, frozen_copy
from tests.albef_core import literal
from tests.albef_core.replay import named
from tests.albef_core.tasks.questions import lagging_teacher, make_questions, random_vqa

# Both sides compute in float64 and differ in the order of their sums.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    num_words=st.integers(2, 6),
    alpha=st.floats(0, 1),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_answer_losses_equal_their_equations_forward_and_backward(
    lengths: list[int], num_words: int, alpha: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher_logits = rng.normal(scale=scale, size=(2, sum(lengths), num_words))
    labels = rng.integers(num_words, size=sum(lengths))
    weights = rng.random(len(lengths))
    is_predicted = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ours = torch.from_numpy(logits).requires_grad_()
    losses = answer_losses(
        ours,
        torch.from_numpy(teacher_logits),
        torch.from_numpy(labels),
        torch.from_numpy(is_predicted),
        alpha=alpha,
    )
    (losses * torch.from_numpy(weights)).sum().backward()

    ends = np.cumsum(lengths)[:-1]
    answers = [[0, *part] for part in np.split(labels, ends)]  # 0: the [CLS] of no logits

    def slow_losses(logits: np.ndarray) -> list:
        by_answer = np.split(logits, ends), np.split(teacher_logits, ends)
        return literal.vqa_losses(*by_answer, answers, alpha=alpha)

    np.testing.assert_allclose(losses.detach().numpy(), slow_losses(logits), **EXACT)

    def weighted(logits: np.ndarray) -> Any:
        return sum(w * loss for w, loss in zip(weights, slow_losses(logits), strict=True))

    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), literal.gradient(weighted, logits), **EXACT)


def test_the_loss_of_two_answers_worked_out_by_hand() -> None:
    # Shares 3/4 and 1/4 at each of three tokens; the teacher does not know.
    logits = torch.tensor([[np.log(3.0), 0.0]]).repeat(3, 1)
    losses = answer_losses(
        logits,
        torch.zeros(3, 2),
        torch.tensor([0, 1, 1]),
        torch.tensor([[True, True], [True, False]]),
        alpha=0.4,
    )
    likely, rare = np.log(4 / 3), np.log(4.0)
    soft = (likely + rare) / 2
    assert losses[0].item() == pytest.approx(0.6 * (likely + rare) + 0.4 * 2 * soft)
    assert losses[1].item() == pytest.approx(0.6 * rare + 0.4 * soft)


def take_step(student: VqaModel, teacher: VqaModel, batch: Any, **options: Any) -> VqaStep:
    options = {"alpha": 0.4, "seed": 5} | options
    return vqa_step(student, teacher, batch, **options)


def test_a_step_weighs_answers_and_averages_questions(tiny_config: ModelConfig) -> None:
    student = random_vqa(tiny_config)
    batch = make_questions(tiny_config, [2, 1, 3])
    step = take_step(student, lagging_teacher(student, tiny_config), batch)
    expected = sum(
        weight * loss for weight, loss in zip(batch.weights, step.answer_losses, strict=True)
    )
    torch.testing.assert_close(step.loss, torch.as_tensor(expected) / 3)


def test_an_answer_belongs_to_its_own_question(tiny_config: ModelConfig) -> None:
    student = random_vqa(tiny_config)
    teacher = lagging_teacher(student, tiny_config)
    batch = make_questions(tiny_config, [2, 1, 3])
    together = take_step(student, teacher, batch).answer_losses
    start, alone = 0, []
    for row, num in enumerate(batch.num_answers.tolist()):
        answers, question = slice(start, start + num), slice(row, row + 1)
        one = replace(
            batch,
            images=batch.images[question],
            question_ids=batch.question_ids[question],
            question_mask=batch.question_mask[question],
            answer_ids=batch.answer_ids[answers],
            answer_mask=batch.answer_mask[answers],
            weights=batch.weights[answers],
            num_answers=batch.num_answers[question],
        )
        alone.append(take_step(student, teacher, one).answer_losses)
        start += num
    torch.testing.assert_close(together, torch.cat(alone))


def test_longer_padding_changes_nothing(tiny_config: ModelConfig) -> None:
    student = random_vqa(replace(tiny_config, dropout=0.2))
    teacher = lagging_teacher(student, tiny_config)
    batch = make_questions(tiny_config, [2, 1])
    pad = torch.nn.functional.pad
    longer = replace(
        batch,
        question_ids=pad(batch.question_ids, (0, 3)),
        question_mask=pad(batch.question_mask, (0, 3)),
        answer_ids=pad(batch.answer_ids, (0, 2)),
        answer_mask=pad(batch.answer_mask, (0, 2)),
    )
    found, expected = (take_step(student, teacher, b).loss for b in (longer, batch))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 100])
def test_a_micro_batch_changes_neither_loss_nor_gradient(
    tiny_config: ModelConfig, micro_batch_size: int
) -> None:
    config = replace(tiny_config, dropout=0.2)
    batch = make_questions(config, [2, 1, 3])
    found = {}
    for size in (None, micro_batch_size):
        student = random_vqa(config)
        teacher = lagging_teacher(student, config).double()
        student.double()
        inputs = replace(batch, images=batch.images.double(), weights=batch.weights.double())
        step = take_step(student, teacher, inputs, micro_batch_size=size)
        step.loss.backward()
        found[size] = {n: p.grad for n, p in named(student).items()} | {"loss": step.loss.detach()}
    torch.testing.assert_close(found[micro_batch_size], found[None])


def test_dropout_depends_on_the_seed_and_differs_between_answers(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, dropout=0.3)
    student = random_vqa(config)
    teacher = lagging_teacher(student, config).eval()
    batch = make_questions(config, [2])
    same = replace(
        batch,
        answer_ids=batch.answer_ids[:1].repeat(2, 1),
        answer_mask=batch.answer_mask[:1].repeat(2, 1),
    )
    losses = take_step(student, teacher, same).answer_losses
    assert not torch.isclose(losses[0], losses[1])
    assert torch.equal(take_step(student, teacher, same).answer_losses, losses)
    assert not torch.equal(take_step(student, teacher, same, seed=6).answer_losses, losses)


def test_every_weight_of_the_student_and_none_of_the_teacher_s_gets_a_gradient(
    tiny_config: ModelConfig,
) -> None:
    student = random_vqa(tiny_config)
    teacher = frozen_copy(student)
    take_step(student, teacher, make_questions(tiny_config, [1])).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_begins_as_the_student_and_then_lags(tiny_config: ModelConfig) -> None:
    student = random_vqa(tiny_config)
    teacher = frozen_copy(student)
    before = {name: value.detach().clone() for name, value in named(student).items()}
    assert teacher.answer_head.decoder.weight is teacher.answer_decoder.word_embeddings.weight
    assert teacher.answer_head.decoder.weight is not student.answer_head.decoder.weight
    student.load_state_dict(random_vqa(tiny_config, seed=1).state_dict())
    follow(teacher, student, momentum=0.75)
    for name, value in named(teacher).items():
        expected = 0.75 * before[name] + 0.25 * named(student)[name]
        torch.testing.assert_close(value, expected)


def as_wide(config: ModelConfig) -> ModelConfig:
    return replace(config, text_width=config.image_width)


def test_a_pre_trained_model_starts_every_weight(
    tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    config = as_wide(tiny_config)
    pretrained, model = make_model(config, seed=3), VqaModel(config)
    state = pretrained.state_dict()
    report = start_from_pretraining(model, state, source="albef")
    assert report.matched == len(named(model))
    assert report.missing == ()
    assert all("projection" in n or "itm" in n or "temp" in n for n in report.unexpected)
    found = named(model)
    for name, source in {
        "answer_decoder.layers.0.cross_attention.key.weight": (
            "multimodal_encoder.layers.0.cross_attention.key.weight"
        ),
        "answer_decoder.norm.bias": "text_encoder.norm.bias",
        "answer_decoder.word_embeddings.weight": "text_encoder.word_embeddings.weight",
        "answer_head.decoder.bias": "mlm_head.decoder.bias",
        "text_encoder.layers.0.mlp.up.weight": "text_encoder.layers.0.mlp.up.weight",
    }.items():
        assert torch.equal(found[name], state[source]), name
    # The decoder's words are its own from now on.
    model.answer_decoder.word_embeddings.weight.data.zero_()
    assert found["text_encoder.word_embeddings.weight"].any()


def test_a_pre_trained_teacher_starts_the_teacher(
    tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    config = as_wide(tiny_config)
    pretrained = Teacher(config, make_model(config, seed=3))
    state = {f"teacher.{name}": value for name, value in pretrained.state_dict().items()}
    started = from_pretraining(state)
    own = {name.removeprefix("teacher."): value for name, value in started.items()}
    assert own.keys() >= named(VqaModel(config)).keys()
    words = "answer_decoder.word_embeddings.weight"
    assert torch.equal(own[words], state["teacher.text_encoder.word_embeddings.weight"])


def test_a_larger_picture_stretches_the_position_embeddings(
    tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    config = as_wide(tiny_config)
    model = VqaModel(replace(config, image_size=2 * config.image_size))
    state = make_model(config).state_dict()
    report = start_from_pretraining(model, state, source="albef")
    assert report.matched == len(named(model))


def test_where_widths_differ_the_decoder_s_look_has_no_start_and_the_report_says_so(
    tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    model = VqaModel(tiny_config)
    report = start_from_pretraining(model, make_model().state_dict(), source="albef")
    layer = "answer_decoder.layers.0.cross_attention"
    assert set(report.missing) == {f"{layer}.key.weight", f"{layer}.value.weight"}


def test_a_model_of_another_size_is_refused_in_one_line(
    tiny_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    config = as_wide(tiny_config)
    model = VqaModel(replace(config, fusion_layers=2))
    with pytest.raises(
        InputError, match=r"^albef\.pth: .*multimodal_encoder\.layers\.1"
    ) as refused:
        start_from_pretraining(model, make_model(config).state_dict(), source="albef.pth")
    assert "\n" not in str(refused.value)
