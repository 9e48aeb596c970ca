"""A step of fine-tuning for retrieval: its equations, and what it shares with pre-training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from albef_core.batch import PairBatch, RetrievalBatch
from albef_core.config import ModelConfig, ObjectiveConfig, Recipe, corrected, paper_2021
from albef_core.distributed import mean_over_workers, own_share
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.outcome import RetrievalStep
from albef_core.pretraining import pretraining_step
from albef_core.tasks.retrieval import retrieval_step
from albef_core.teacher import Teacher
from tests.albef_core import literal
from tests.processes import start_workers

ALPHA, NUM_SLOTS = 0.4, 5
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides
ONE_CASE_AT_A_TIME = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def without_masking(batch: PairBatch) -> RetrievalBatch:
    return RetrievalBatch(
        images=batch.images,
        token_ids=batch.token_ids,
        attention_mask=batch.attention_mask,
        image_ids=batch.image_ids,
    )


def queues_with(image_ids: list[int], student: ALBEF) -> Queues:
    """Rings that hold random unit features of these photographs."""
    size = len(student.image_projection.weight)
    objective = ObjectiveConfig(num_slots=NUM_SLOTS)
    queues = Queues(ModelConfig(feature_size=size), objective, corrected())
    queues.to(student.temperature.dtype)
    generator = torch.Generator().manual_seed(9)
    images, texts = (
        F.normalize(torch.randn(len(image_ids), size, generator=generator)) for _ in range(2)
    )
    queues.push(images, texts, torch.tensor(image_ids, dtype=torch.int64))
    return queues


def take_step(
    student: ALBEF,
    teacher: Teacher,
    batch: RetrievalBatch,
    *,
    queue_ids: list[int] | None = None,
    recipe: Recipe | None = None,
    micro_batch_size: int | None = None,
) -> RetrievalStep:
    return retrieval_step(
        student,
        teacher,
        queues_with(queue_ids or [], student),
        batch,
        alpha=ALPHA,
        recipe=recipe or corrected(),
        seed=3,
        micro_batch_size=micro_batch_size,
    )


def gradients(student: ALBEF, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@ONE_CASE_AT_A_TIME
@given(
    image_ids=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    queue_ids=st.lists(st.integers(1, 6), max_size=NUM_SLOTS),
    is_published=st.booleans(),
)
def test_the_losses_equal_their_equations(
    tiny_model: ALBEF,
    tiny_teacher: Teacher,
    make_pairs: Callable[..., PairBatch],
    image_ids: list[int],
    queue_ids: list[int],
    is_published: bool,
) -> None:
    student, teacher = tiny_model.double(), tiny_teacher.double()
    batch = make_pairs(image_ids)
    batch = without_masking(replace(batch, images=batch.images.double()))
    # The published code stops where a caption has no other photograph to be confused with.
    recipe = replace(paper_2021() if is_published else corrected(), guard_empty=True)
    outcome = take_step(student, teacher, batch, queue_ids=queue_ids, recipe=recipe)

    queues = queues_with(queue_ids, student)
    ids, valid = queues.text.image_ids.numpy(), queues.text.is_valid.numpy()
    positive = literal.positives(batch.image_ids.numpy(), ids, valid, by_id=True)
    used = np.concatenate([np.ones(len(batch), bool), valid])
    total, weights = 0.0, []
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
        soft = literal.similarities(teachers.numpy(), keys, student.temperature.item())
        targets = literal.itc_targets(soft, positive, used, alpha=ALPHA)
        similarity = literal.similarities(own.detach().numpy(), keys, student.temperature.item())
        total += literal.itc_loss(similarity, targets, used) / 2
        in_batch = slice(len(batch))
        weights.append(
            literal.negative_weights(
                similarity[:, in_batch], positive[:, in_batch], guard_empty=True
            )
        )
    np.testing.assert_allclose(outcome.itc.loss.item(), total, **EXACT)
    np.testing.assert_allclose(outcome.itm.text_weights.numpy(), weights[0], **EXACT)
    np.testing.assert_allclose(outcome.itm.image_weights.numpy(), weights[1], **EXACT)
    itm = literal.itm_loss(
        outcome.itm.logits.detach().numpy(), outcome.itm.labels.numpy(), outcome.itm.counts.numpy()
    )
    np.testing.assert_allclose(outcome.loss.item(), total + itm, **EXACT)


def test_it_is_pre_training_without_masked_words(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    queues = queues_with([7, 50], tiny_model)
    arguments: dict[str, Any] = {"alpha": ALPHA, "recipe": corrected(), "seed": 3}
    whole = pretraining_step(tiny_model, tiny_teacher, queues, pairs, **arguments)
    step = retrieval_step(tiny_model, tiny_teacher, queues, without_masking(pairs), **arguments)
    assert torch.equal(step.loss, whole.itc.loss + whole.itm.loss)


def test_positives_go_by_image_whatever_the_recipe_says(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    recipe = replace(corrected(), image_id_positives=False)
    outcome = take_step(tiny_model, tiny_teacher, pairs, queue_ids=[7, 50], recipe=recipe)
    expected = torch.zeros(4, 4 + NUM_SLOTS, dtype=torch.bool)
    expected[:2, [0, 1, 4]] = True
    expected[2, 2] = expected[3, 3] = True
    assert torch.equal(outcome.itc.is_positive, expected)
    assert (outcome.itm.text_weights[0, :2] == 0).all()


def test_the_mlm_head_gets_no_gradient(
    tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch
) -> None:
    found = gradients(tiny_model, take_step(tiny_model, tiny_teacher, pairs).loss)
    without = {name for name, _ in tiny_model.named_parameters()} - found.keys()
    assert without
    assert all(name.startswith("mlm_head.") for name in without)


def test_a_single_pair_has_a_match_to_learn_and_no_negative(
    tiny_model: ALBEF, tiny_teacher: Teacher, make_pairs: Callable[..., PairBatch]
) -> None:
    outcome = take_step(tiny_model, tiny_teacher, make_pairs([7]))
    assert outcome.itm.counts.tolist() == [True, False, False]
    assert torch.isfinite(outcome.loss)


def test_nothing_moves(tiny_model: ALBEF, tiny_teacher: Teacher, pairs: PairBatch) -> None:
    queues = queues_with([7], tiny_model)
    modules = tiny_model, tiny_teacher, queues
    before = [v.clone() for module in modules for v in module.state_dict().values()]
    step = retrieval_step(tiny_model, tiny_teacher, queues, pairs, alpha=ALPHA, recipe=corrected())
    step.loss.backward()
    after = [v for module in modules for v in module.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_micro_batch_changes_no_gradient(
    tiny_config: ModelConfig,
    make_model: Callable[..., ALBEF],
    make_pairs: Callable[..., PairBatch],
) -> None:
    student = make_model(replace(tiny_config, dropout=0.1)).train()
    teacher = Teacher(replace(tiny_config, dropout=0.1), student).train()
    batch = make_pairs([1, 2, 3, 3, 4])
    whole = gradients(student, take_step(student, teacher, batch).loss)
    parts = gradients(student, take_step(student, teacher, batch, micro_batch_size=2).loss)
    # Sums in another order, over logits divided by 0.07.
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


WORKERS, BATCH = 2, 5


def train_once() -> dict[str, Tensor]:
    """Give the global loss and the averaged gradients of one step from fixed weights."""
    torch.manual_seed(0)
    sizes = ModelConfig(
        image_size=16, patch_size=8, image_width=16, image_layers=1, image_heads=2,
        text_width=16, text_heads=2, text_mlp_width=32, text_layers=1, fusion_layers=1,
        vocab_size=50, max_positions=16, feature_size=8,
    )  # fmt: skip
    student = ALBEF(sizes).double()
    teacher = Teacher(sizes, student).double()
    image_ids = torch.tensor([3, 1, 2, 3, 1])
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)[image_ids]
    token_ids, own = torch.randint(5, 50, (BATCH, 6)), own_share(BATCH)
    here = slice(own.start, own.stop)
    batch = RetrievalBatch(
        images=images[here],
        token_ids=token_ids[here],
        attention_mask=torch.ones(len(own), 6, dtype=torch.bool),
        image_ids=image_ids[here],
        num_global=BATCH,
    )
    loss = take_step(student, teacher, batch, queue_ids=[3, 9]).loss
    found = gradients(student, loss) | {"loss": loss.detach()}
    return {name: mean_over_workers(value) for name, value in found.items()}


@pytest.mark.slow
def test_uneven_shares_of_two_workers_change_nothing(tmp_path: Path) -> None:
    start_workers(_worker, tmp_path, num=WORKERS)
    alone = train_once()
    for rank in range(WORKERS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, alone)


def _worker(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORKERS
    )
    torch.save(train_once(), out / f"{rank}.pt")
    dist.destroy_process_group()
