"""The published pre-training step, its own order of work: the peer of `benchmarks.against`.

Written after the description of salesforce/ALBEF's `models/model_pretrain.py` and `Pretrain.py`, on
our layers, whose attention is no slower: images are projected anew in each of three fusion passes,
logits are made for every word and not for the masked ones alone, hard negatives are drawn one row
at a time, the teacher moves one tensor at a time, and AdamW is the plain one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF
from albef_core.optim import adamw
from albef_core.teacher import Teacher
from benchmarks.step import Options, random_batch, sizes_of

ALPHA = 0.4


def make_published_step(options: Options) -> Callable[[], Tensor]:
    """Build a model and a function that trains it by one step and gives the loss."""
    config, sizes = sizes_of(options)
    torch.manual_seed(0)
    device = torch.device(options.device)
    student = ALBEF(sizes).to(device)
    teacher = Teacher(sizes, student)
    ring = F.normalize(torch.randn(2, sizes.feature_size, config.objective.num_slots), dim=1)
    image_queue, text_queue = ring.to(device)
    groups = adamw(student, config.optim, decay_weights_only=False).param_groups
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
        lr=config.optim.lr,
        foreach=False,
        fused=False,
    )
    size = options.batch_size
    batch = random_batch(size, sizes.image_size, config.text.max_tokens, sizes.vocab_size, device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            loss, image_features, text_features = losses(
                student, teacher, image_queue, text_queue, batch
            )
        with torch.no_grad():
            image_queue[:, :size], text_queue[:, :size] = image_features.T, text_features.T
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def losses(
    student: ALBEF, teacher: Teacher, image_queue: Tensor, text_queue: Tensor, batch: PairBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the three losses; also give the teacher's features for the queues."""
    mask, size = batch.attention_mask, len(batch)
    student.clamp_temperature()
    images, image_features = student.encode_image(batch.images)
    texts, text_features = student.encode_text(batch.token_ids, mask)
    with torch.no_grad():
        theirs = dict(student.named_parameters())
        for name, weight in teacher.named_parameters():
            weight.data = weight.data * 0.995 + theirs[name].data * (1 - 0.995)
        teacher_images, teacher_image_features = teacher.encode_image(batch.images)
        _, teacher_text_features = teacher.encode_text(batch.token_ids, mask)
        all_images = torch.cat([teacher_image_features.T, image_queue.clone()], dim=1)
        all_texts = torch.cat([teacher_text_features.T, text_queue.clone()], dim=1)
        labels = torch.zeros(size, all_texts.shape[1], device=all_texts.device).fill_diagonal_(1)
        i2t_teacher = teacher_image_features @ all_texts / student.temperature
        t2i_teacher = teacher_text_features @ all_images / student.temperature
        i2t_targets = ALPHA * i2t_teacher.softmax(dim=1) + (1 - ALPHA) * labels
        t2i_targets = ALPHA * t2i_teacher.softmax(dim=1) + (1 - ALPHA) * labels
    i2t = image_features @ all_texts / student.temperature
    t2i = text_features @ all_images / student.temperature
    i2t_loss = -(i2t.log_softmax(dim=1) * i2t_targets).sum(dim=1).mean()
    t2i_loss = -(t2i.log_softmax(dim=1) * t2i_targets).sum(dim=1).mean()
    itc = (i2t_loss + t2i_loss) / 2

    matched = student.fuse(texts, mask, images)[:, 0]
    with torch.no_grad():
        text_weights = i2t[:, :size].softmax(dim=1).fill_diagonal_(0)
        image_weights = t2i[:, :size].softmax(dim=1).fill_diagonal_(0)
    rows = range(size)
    images_drawn = [int(torch.multinomial(image_weights[row], 1).item()) for row in rows]
    texts_drawn = [int(torch.multinomial(text_weights[row], 1).item()) for row in rows]
    wrong_images = torch.stack([images[drawn] for drawn in images_drawn])
    wrong_texts = torch.stack([texts[drawn] for drawn in texts_drawn])
    wrong_mask = torch.stack([mask[drawn] for drawn in texts_drawn])
    wrong = student.fuse(
        torch.cat([texts, wrong_texts]),
        torch.cat([mask, wrong_mask]),
        torch.cat([wrong_images, images]),
    )[:, 0]
    is_match = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long().to(images.device)
    itm = F.cross_entropy(student.itm_head(torch.cat([matched, wrong])), is_match)

    with torch.no_grad():
        tokens, _ = teacher.encode_text(batch.masked_ids, mask)
        soft = teacher.mlm_head(teacher.fuse(tokens, mask, teacher_images)).softmax(dim=-1)
    tokens, _ = student.encode_text(batch.masked_ids, mask)
    logits = student.mlm_head(student.fuse(tokens, mask, images))
    hard_loss = F.cross_entropy(
        logits.flatten(0, 1), batch.mlm_labels.flatten(), ignore_index=NOT_SCORED
    )
    soft_loss = -(logits.log_softmax(dim=-1) * soft).sum(dim=-1)
    soft_loss = soft_loss[batch.mlm_labels != NOT_SCORED].mean()
    mlm = (1 - ALPHA) * hard_loss + ALPHA * soft_loss
    return itc + itm + mlm, teacher_image_features, teacher_text_features
