"""Batches of any size against a queue of any length: the step works, the ring stays a ring."""

from collections.abc import Callable

import pytest
import torch

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, OptimConfig, corrected
from albef_core.feature_queue import Queues
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.pretraining import pretraining_step
from albef_core.teacher import Teacher
from tests.albef_core.literal import Ring

NUM_SLOTS = 5
NUM_STEPS = 4


@pytest.mark.parametrize("batch_size", range(1, 3 * NUM_SLOTS + 1))
def test_any_batch_size_trains_and_leaves_the_literal_ring(
    tiny_config: ModelConfig,
    make_model: Callable[..., ALBEF],
    make_pairs: Callable[..., PairBatch],
    batch_size: int,
) -> None:
    student = make_model()
    before = {name: value.clone() for name, value in student.named_parameters()}
    teacher = Teacher(tiny_config, student)
    queues = Queues(tiny_config, ObjectiveConfig(num_slots=NUM_SLOTS), corrected())
    optimizer = adamw(student, OptimConfig(lr=1e-3), decay_weights_only=True)
    images, texts = Ring(NUM_SLOTS), Ring(NUM_SLOTS)
    for step in range(NUM_STEPS):
        ids = list(range(step * batch_size, (step + 1) * batch_size))
        student.clamp_temperature()
        teacher.follow(student, momentum=0.9)
        outcome = pretraining_step(
            student,
            teacher,
            queues,
            make_pairs(ids, seed=step),
            alpha=0.4,
            recipe=corrected(),
            seed=step,
        )
        optimizer.zero_grad()
        outcome.loss.backward()
        for loss in (outcome.itc.loss, outcome.itm.loss, outcome.mlm.losses.total):
            assert loss.isfinite()
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        # Earlier features are keys; those of this batch come after the losses.
        assert outcome.itc.i2t.shape == (batch_size, batch_size + NUM_SLOTS)
        num_keys = batch_size + min(step * batch_size, NUM_SLOTS)
        assert ((outcome.itc.i2t_targets > 0).sum(dim=1) == num_keys).all()
        optimizer.step()
        image_features = outcome.teacher_image_features
        text_features = outcome.teacher_text_features
        queues.push(image_features, text_features, torch.tensor(ids))
        images.push(list(zip(ids, image_features, strict=True)))
        texts.push(list(zip(ids, text_features, strict=True)))
    for queue, ring in ((queues.image, images), (queues.text, texts)):
        assert queue.pointer.item() == ring.next
        assert queue.is_valid.tolist() == [row is not None for row in ring.rows]
        for slot, row in enumerate(ring.rows):
            if row is not None:
                assert queue.image_ids[slot].item() == row[0]
                assert torch.equal(queue.features[slot], row[1])
    assert any(not torch.equal(value, before[n]) for n, value in student.named_parameters())
