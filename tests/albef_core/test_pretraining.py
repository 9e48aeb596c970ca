"""A whole step of the corrected recipe, and where the published one differs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, Recipe, corrected, paper_2021
from albef_core.distributed import StepModel
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF, MAX_TEMPERATURE, MIN_TEMPERATURE
from albef_core.objectives.itm import draw_hard_negatives
from albef_core.outcome import PretrainingStep
from albef_core.pretraining import Sampler, pretraining_step
from albef_core.teacher import Teacher
from tests.albef_core import literal

ALPHA = 0.4
NUM_SLOTS = 8

# How far two ways to the same number may lie apart, and why.
FLOAT32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}  # other sums, then division by 0.07
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides
# bfloat16 keeps 8 bits: 4e-3 of every product in the encoders, over a dozen of them.
BFLOAT16: dict[str, Any] = {"rtol": 0.05, "atol": 0.02}


def take_step(
    student: ALBEF,
    teacher: Teacher,
    batch: PairBatch,
    *,
    queues: Queues | None = None,
    recipe: Recipe | None = None,
    alpha: float = ALPHA,
    draw: Sampler | None = None,
) -> PretrainingStep:
    """One step of seed 0."""
    return pretraining_step(
        student,
        teacher,
        queues or empty_queues(student),
        batch,
        alpha=alpha,
        recipe=recipe or corrected(),
        draw=draw or draw_hard_negatives,
    )


def empty_queues(student: ALBEF, *, num_slots: int = NUM_SLOTS) -> Queues:
    feature_size = len(student.image_projection.weight)
    sizes = ModelConfig(feature_size=feature_size)
    queues = Queues(sizes, ObjectiveConfig(num_slots=num_slots), corrected())
    return queues.to(student.temperature.dtype)


def push_random(queues: Queues, image_ids: list[int]) -> None:
    """Store random unit features of these photographs."""
    generator = torch.Generator().manual_seed(9)
    shape = (len(image_ids), queues.image.features.shape[1])
    images, texts = (F.normalize(torch.randn(shape, generator=generator)) for _ in range(2))
    queues.push(images, texts, torch.tensor(image_ids, dtype=torch.int64))


def state_of(*modules: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def gradients(student: ALBEF, loss: Tensor) -> dict[str, Tensor]:
    """Every gradient of a loss; zeros where none arrives."""
    student.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in student.named_parameters()
    }


def test_the_loss_is_the_sum_of_the_three(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    outcome = take_step(tiny_model, tiny_teacher, pairs)
    total = outcome.itc.loss + outcome.itm.loss + outcome.mlm.losses.total
    assert torch.equal(outcome.loss, total)


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("num_written", [0, NUM_SLOTS // 2, NUM_SLOTS])
def test_contrast_equals_its_equations_on_the_features_of_the_step(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch, by_id: bool, num_written: int
) -> None:
    student, teacher = tiny_model.double(), tiny_teacher.double()
    batch = replace(pairs, images=pairs.images.double())
    queues = empty_queues(student)
    push_random(queues, [7, 50, 51, 8, 52, 53, 54, 55][:num_written])
    recipe = replace(corrected(), image_id_positives=by_id)
    outcome = take_step(student, teacher, batch, queues=queues, recipe=recipe)

    ids, valid = queues.text.image_ids.numpy(), queues.text.is_valid.numpy()
    positive = literal.positives(pairs.image_ids.numpy(), ids, valid, by_id=by_id)
    used = np.concatenate([np.ones(len(pairs), bool), valid])
    losses = []
    for own, teachers, others, queue in (
        (
            outcome.image_features,
            outcome.teacher_image_features,
            outcome.teacher_text_features,
            queues.text,
        ),
        (
            outcome.text_features,
            outcome.teacher_text_features,
            outcome.teacher_image_features,
            queues.image,
        ),
    ):
        keys = torch.cat([others, queue.features]).numpy()
        temperature = student.temperature.item()
        soft = literal.similarities(teachers.numpy(), keys, temperature)
        targets = literal.itc_targets(soft, positive, used, alpha=ALPHA)
        similarity = literal.similarities(own.detach().numpy(), keys, temperature)
        losses.append(literal.itc_loss(similarity, targets, used))
    found = [outcome.itc.i2t_loss.item(), outcome.itc.t2i_loss.item(), outcome.itc.loss.item()]
    np.testing.assert_allclose(found, [*losses, sum(losses) / 2], **EXACT)


def test_captions_of_one_photograph_share_the_target(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    queues = empty_queues(tiny_model)
    push_random(queues, [7, 50])
    outcome = take_step(tiny_model, tiny_teacher, pairs, queues=queues, alpha=0.0)
    third = 1 / 3
    expected = torch.zeros(4, 4 + NUM_SLOTS)
    expected[:2, [0, 1, 4]] = third
    expected[2, 2] = expected[3, 3] = 1
    torch.testing.assert_close(outcome.itc.i2t_targets, expected)
    torch.testing.assert_close(outcome.itc.t2i_targets, expected)


def test_the_published_recipe_takes_only_the_diagonal_as_positive(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    outcome = take_step(tiny_model, tiny_teacher, pairs, recipe=paper_2021(), alpha=0.0)
    torch.testing.assert_close(outcome.itc.i2t_targets, torch.eye(4, 4 + NUM_SLOTS))
    # ... and may draw the other caption of the same photograph as wrong.
    assert outcome.itm.text_weights[0, 1] > 0


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 0.07, MAX_TEMPERATURE])
def test_the_same_photograph_is_never_drawn_as_a_negative(
    tiny_model: ALBEF,
    tiny_teacher: Teacher,
    make_pairs: Callable[..., PairBatch],
    temperature: float,
) -> None:
    torch.nn.init.constant_(tiny_model.temperature, temperature)
    batch = make_pairs([7, 7, 8, 7, 8, 9])
    itm = take_step(tiny_model, tiny_teacher, batch).itm
    generator = torch.Generator().manual_seed(1)
    for weights in (itm.image_weights, itm.text_weights):
        for _ in range(300):
            numbers = torch.rand(len(batch), generator=generator, dtype=torch.float64)
            drawn = draw_hard_negatives(weights, numbers)
            assert (batch.image_ids[drawn] != batch.image_ids).all()


def test_negatives_are_drawn_for_the_texts_first_and_then_for_the_images(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    asked: list[Tensor] = []
    answers = [torch.tensor([2, 3, 0, 0]), torch.tensor([3, 2, 1, 1])]

    def draw(weights: Tensor, _numbers: Tensor) -> Tensor:
        asked.append(weights)
        return answers[len(asked) - 1]

    itm = take_step(tiny_model, tiny_teacher, pairs, draw=draw).itm
    assert torch.equal(asked[0], itm.image_weights)
    assert torch.equal(asked[1], itm.text_weights)
    assert torch.equal(itm.negatives.images, answers[0])
    assert torch.equal(itm.negatives.texts, answers[1])


@pytest.mark.parametrize("image_ids", [[5], [5, 5, 5], [5, 5, 6]])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, MAX_TEMPERATURE])
def test_loss_and_every_gradient_are_finite_however_poor_the_batch(
    tiny_model: ALBEF,
    tiny_teacher: Teacher,
    make_pairs: Callable[..., PairBatch],
    image_ids: list[int],
    masked: bool,
    temperature: float,
) -> None:
    torch.nn.init.constant_(tiny_model.temperature, temperature)
    outcome = take_step(tiny_model, tiny_teacher, make_pairs(image_ids, masked=masked))
    assert outcome.loss.isfinite()
    for name, gradient in gradients(tiny_model, outcome.loss).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("image_ids", [[5], [5, 5, 5]])
def test_a_batch_of_one_photograph_counts_no_negatives(
    tiny_model: ALBEF,
    tiny_teacher: Teacher,
    make_pairs: Callable[..., PairBatch],
    image_ids: list[int],
) -> None:
    itm = take_step(tiny_model, tiny_teacher, make_pairs(image_ids)).itm
    num_pairs = len(image_ids)
    assert itm.counts.tolist() == [True] * num_pairs + [False] * (2 * num_pairs)
    torch.testing.assert_close(
        itm.loss, F.cross_entropy(itm.logits[:num_pairs], itm.labels[:num_pairs])
    )


def test_the_published_recipe_stops_at_a_batch_of_one(
    tiny_model: ALBEF, tiny_teacher: Teacher, make_pairs: Callable[..., PairBatch]
) -> None:
    with pytest.raises(RuntimeError, match="no candidate"):
        take_step(tiny_model, tiny_teacher, make_pairs([5]), recipe=paper_2021())


def test_with_nothing_masked_mlm_is_zero_and_moves_nothing(
    tiny_model: ALBEF, tiny_teacher: Teacher, make_pairs: Callable[..., PairBatch]
) -> None:
    outcome = take_step(tiny_model, tiny_teacher, make_pairs([1, 2, 3], masked=False))
    assert outcome.mlm.losses.total.item() == 0
    for name, gradient in gradients(tiny_model, outcome.mlm.losses.total).items():
        assert (gradient == 0).all(), name


def test_with_nothing_masked_the_published_recipe_gives_nan(
    tiny_model: ALBEF, tiny_teacher: Teacher, make_pairs: Callable[..., PairBatch]
) -> None:
    batch = make_pairs([1, 2, 3], masked=False)
    outcome = take_step(tiny_model, tiny_teacher, batch, recipe=paper_2021())
    assert outcome.mlm.losses.total.isnan()
    assert outcome.itc.loss.isfinite()


@pytest.mark.parametrize("num_slots", [1, 64])
def test_an_empty_queue_of_any_length_gives_the_loss_of_no_queue(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch, num_slots: int
) -> None:
    queues = empty_queues(tiny_model, num_slots=num_slots)
    itc = take_step(tiny_model, tiny_teacher, pairs, queues=queues).itc
    same = pairs.image_ids[:, None] == pairs.image_ids
    labels = same / same.sum(dim=1, keepdim=True)
    losses = []
    for own, teachers in ((itc.i2t, itc.teacher_i2t), (itc.t2i, itc.teacher_t2i)):
        targets = ALPHA * teachers[:, :4].softmax(dim=1) + (1 - ALPHA) * labels
        losses.append(F.cross_entropy(own[:, :4], targets))
    torch.testing.assert_close(itc.loss, sum(losses) / 2)


def test_under_bfloat16_similarities_and_losses_are_float32_and_near(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    queues = empty_queues(tiny_model)
    push_random(queues, [50, 51, 52, 53])
    draws = [torch.tensor([2, 3, 0, 0]), torch.tensor([3, 2, 1, 1])]
    outcomes = []
    for is_half in (False, True):
        answers = iter(draws)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            outcomes.append(
                take_step(
                    tiny_model,
                    tiny_teacher,
                    pairs,
                    queues=queues,
                    draw=lambda _weights, _numbers, answers=answers: next(answers),
                )
            )
    single, half = outcomes
    for of_single, of_half in (
        (single.itc.loss, half.itc.loss),
        (single.itm.loss, half.itm.loss),
        (single.mlm.losses.total, half.mlm.losses.total),
        (single.loss, half.loss),
    ):
        assert of_half.dtype == torch.float32
        torch.testing.assert_close(of_half, of_single, **BFLOAT16)
    # The encoders round, the contrast of what they give does not: a bfloat16 product would be
    # off by some 0.05.
    keys = torch.cat([half.teacher_text_features, queues.text.features]).double()
    exact = half.image_features.double() @ keys.T / tiny_model.temperature.double()
    used = torch.cat([torch.ones(4, dtype=torch.bool), queues.text.is_valid])
    assert half.itc.i2t.dtype == torch.float32
    torch.testing.assert_close(half.itc.i2t[:, used], exact[:, used].float(), **FLOAT32)
    assert not torch.equal(half.image_features, single.image_features)


def test_longer_padding_changes_neither_losses_nor_gradients(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    padded = replace(
        pairs,
        token_ids=F.pad(pairs.token_ids, (0, 5)),
        attention_mask=F.pad(pairs.attention_mask, (0, 5)),
        masked_ids=F.pad(pairs.masked_ids, (0, 5)),
        mlm_labels=F.pad(pairs.mlm_labels, (0, 5), value=-100),
    )
    short = take_step(tiny_model, tiny_teacher, pairs)
    long = take_step(tiny_model, tiny_teacher, padded)
    torch.testing.assert_close(long.itc.loss, short.itc.loss, **FLOAT32)
    torch.testing.assert_close(long.itm.loss, short.itm.loss, **FLOAT32)
    torch.testing.assert_close(long.mlm.losses.total, short.mlm.losses.total, **FLOAT32)
    after_short = gradients(tiny_model, short.loss)
    after_long = gradients(tiny_model, long.loss)
    largest = max(gradient.norm() for gradient in after_short.values())
    for name, gradient in after_short.items():
        assert (after_long[name] - gradient).norm() <= 1e-5 * largest, name


def test_what_stands_in_the_padding_changes_nothing(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    scrambled = replace(
        pairs,
        token_ids=torch.where(pairs.attention_mask, pairs.token_ids, 9),
        masked_ids=torch.where(pairs.attention_mask, pairs.masked_ids, 11),
    )
    plain = take_step(tiny_model, tiny_teacher, pairs)
    other = take_step(tiny_model, tiny_teacher, scrambled)
    assert not torch.equal(scrambled.token_ids, pairs.token_ids)
    assert torch.equal(other.loss, plain.loss)


def test_a_step_moves_neither_weights_nor_teacher_nor_queues(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    torch.nn.init.constant_(tiny_model.temperature, 0.9)  # beyond the clamp, which is not its job
    queues = empty_queues(tiny_model)
    push_random(queues, [50, 51, 52])
    before = state_of(tiny_model, tiny_teacher, queues)
    take_step(tiny_model, tiny_teacher, pairs, queues=queues).loss.backward()
    after = state_of(tiny_model, tiny_teacher, queues)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_every_weight_of_the_student_learns_and_the_teacher_does_not(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    outcome = take_step(tiny_model, tiny_teacher, pairs)
    outcome.loss.backward()
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None, name
        # A softmax over keys does not feel what is added to all of them.
        assert parameter.grad.abs().max() > 0 or name.endswith(".key.bias"), name
    assert all(parameter.grad is None for parameter in tiny_teacher.parameters())
    for advice in (
        outcome.teacher_image_features,
        outcome.teacher_text_features,
        outcome.itc.teacher_i2t,
        outcome.itc.i2t_targets,
        outcome.itm.image_weights,
        outcome.mlm.teacher_logits,
    ):
        assert not advice.requires_grad


def test_a_teacher_equal_to_its_student_sees_what_the_student_sees(
    tiny_config: ModelConfig, tiny_model: ALBEF, pairs: PairBatch
) -> None:
    outcome = take_step(tiny_model, Teacher(tiny_config, tiny_model), pairs)
    torch.testing.assert_close(outcome.teacher_image_features, outcome.image_features)
    torch.testing.assert_close(outcome.teacher_text_features, outcome.text_features)
    torch.testing.assert_close(outcome.itc.teacher_i2t, outcome.itc.i2t)
    # The teacher reads the masked caption too, else it would know the word.
    torch.testing.assert_close(outcome.mlm.teacher_logits, outcome.mlm.logits)


def test_mlm_reads_the_image(tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch) -> None:
    other = replace(pairs, images=pairs.images.flip(0))
    first, second = (take_step(tiny_model, tiny_teacher, batch) for batch in (pairs, other))
    assert (first.mlm.logits - second.mlm.logits).abs().max() > 1e-3


def test_queues_store_images_and_texts_side_by_side(tiny_model: ALBEF) -> None:
    queues = empty_queues(tiny_model)
    push_random(queues, [3, 4, 5])
    assert queues.image.image_ids[:3].tolist() == queues.text.image_ids[:3].tolist() == [3, 4, 5]
    assert not torch.equal(queues.image.features, queues.text.features)


def test_published_queues_start_full_of_different_random_vectors(
    tiny_config: ModelConfig,
) -> None:
    queues = Queues(tiny_config, ObjectiveConfig(num_slots=NUM_SLOTS), paper_2021(), seed=1)
    again = Queues(tiny_config, ObjectiveConfig(num_slots=NUM_SLOTS), paper_2021(), seed=1)
    assert queues.image.is_valid.all()
    assert not torch.equal(queues.image.features, queues.text.features)
    assert torch.equal(queues.image.features, again.image.features)


def test_the_wrapped_model_takes_the_same_step(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    queues, recipe = empty_queues(tiny_model), corrected()
    draws = [torch.tensor([2, 3, 0, 0]), torch.tensor([3, 2, 1, 1])] * 2
    answers = iter(draws)
    arguments: dict[str, Any] = {
        "alpha": ALPHA,
        "recipe": recipe,
        "draw": lambda _weights, _numbers: next(answers),
    }
    wrapped = StepModel(tiny_model, pretraining_step)(tiny_teacher, queues, pairs, **arguments)
    plain = pretraining_step(tiny_model, tiny_teacher, queues, pairs, **arguments)
    assert torch.equal(wrapped.loss, plain.loss)
