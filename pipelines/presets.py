"""Named starting points of trainings: functions that return a complete config."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from albef_core.config import (
    DistillConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TextConfig,
)
from pipelines.config import AugmentConfig, FinetuneConfig, PlanConfig, PretrainConfig, TaskName
from pipelines.sweep_config import SweepConfig

UNSET = Path("CORPUS")
Wider = TypeVar("Wider", bound=PretrainConfig)


def base() -> PretrainConfig:
    """The paper's model: ViT-B/16 at 256 px, BERT-base, queue 65,536."""
    return PretrainConfig(corpus=UNSET, epochs=30, precision="bf16")


def paper_4m() -> PretrainConfig:
    """The paper's first setting: 30 epochs at batch 512 on 8 GPUs, of COCO, VG, SBU and CC3M.

    These are 4.0 million pictures; the published run took 2 to 4 days on 8 A100.
    """
    return dataclasses.replace(base(), batch_size=512, workers=8, device="cuda")


def paper_14m() -> PretrainConfig:
    """The paper's second setting: the same with CC12M beside it, 14.1 million pictures."""
    return paper_4m()


def small() -> PretrainConfig:
    """A model for one GPU or a patient CPU: 128 px, width 384, 4 + 4 text layers, random start."""
    return PretrainConfig(
        corpus=UNSET,
        epochs=20,
        batch_size=128,
        image_weights="random",
        text_weights="random",
        model=ModelConfig(
            image_size=128,
            patch_size=16,
            image_width=384,
            image_layers=8,
            image_heads=6,
            text_width=384,
            text_heads=6,
            text_mlp_width=1536,
            text_layers=4,
            fusion_layers=4,
            vocab_size=0,
            max_positions=64,
        ),
        text=TextConfig(tokenizer="corpus"),
        objective=ObjectiveConfig(num_slots=8192),
        optim=OptimConfig(lr=5e-4, min_lr=1e-5, warmup_steps=200, clip_norm=1.0),
    )


def tiny() -> PretrainConfig:
    """A model for laptops and tests: 64 px, width 128, 2 + 2 text layers, random start."""
    return PretrainConfig(
        corpus=UNSET,
        epochs=10,
        batch_size=32,
        image_weights="random",
        text_weights="random",
        model=ModelConfig(
            image_size=64,
            patch_size=16,
            image_width=128,
            image_layers=4,
            image_heads=4,
            image_mlp_ratio=2.0,
            text_width=128,
            text_heads=4,
            text_mlp_width=256,
            text_layers=2,
            fusion_layers=2,
            vocab_size=0,
            max_positions=64,
            feature_size=64,
            dropout=0.0,
        ),
        text=TextConfig(tokenizer="corpus"),
        augment=AugmentConfig(crop_scale_min=0.6, flip=False, rand_ops=0),
        # Runs of a few hundred steps: a slower teacher would still be random, a longer queue stale.
        objective=ObjectiveConfig(num_slots=64, teacher_momentum=0.99),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=50, clip_norm=1.0),
    )


PRETRAIN = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "paper-4m": paper_4m,
    "paper-14m": paper_14m,
}


def _widened(
    preset: Callable[[], PretrainConfig], kind: type[Wider], **own: Any
) -> Callable[[], Wider]:
    """Make a preset of a job that takes all of a pre-training's fields, and more."""

    @functools.wraps(preset)
    def wider() -> Wider:
        return kind(**(vars(preset()) | own))

    return wider


PLAN = {name: _widened(preset, PlanConfig, corpus=Path()) for name, preset in PRETRAIN.items()}
"""The presets of pre-training, to be planned."""
SWEEP = {
    name: _widened(
        preset,
        SweepConfig,
        # A trial of one worker trains in its own process, which starts in a tenth of the time.
        workers=preset().workers if preset().workers > 1 else 0,
        experiment="albef-sweep",
        register="",
    )
    for name, preset in PRETRAIN.items()
}
"""The same, to be varied by a sweep."""

INIT = "MODEL"
"""Stands for a model that the command names."""


def published(task: TaskName, *, epochs: int, lr: float = 2e-5, **more: Any) -> FinetuneConfig:
    """Give what the published recipes share: batch 256, cosine to 1e-6, crops of half and up.

    Texts keep 30 words there, and all their tokens: 40 are enough but for rare spellings.
    """
    shared = {
        "batch_size": 256,
        "augment": AugmentConfig(crop_scale_min=0.5),
        "max_words": 30,
        "max_tokens": 40,
        "optim": OptimConfig(lr=lr, min_lr=1e-6, warmup_steps=100),
        "experiment": f"albef-{task}",
        "register": f"albef-{task}",
    }
    return FinetuneConfig(task=task, corpus=UNSET, init=INIT, epochs=epochs, **(shared | more))


def retrieval() -> FinetuneConfig:
    """ITC and ITM on pairs, positives by image: 10 epochs at rate 1e-5 (Flickr30k; COCO: 5).

    Of a text 30 tokens are read, as in the published evaluation.
    """
    return published("retrieval", epochs=10, lr=1e-5, max_tokens=30)


def grounding() -> FinetuneConfig:
    """The same from expressions, without boxes, on whole pictures: 5 epochs (RefCOCO+)."""
    return published("grounding", epochs=5, lr=1e-5, augment=AugmentConfig(crop_scale_min=1.0))


def entailment() -> FinetuneConfig:
    """Three classes from the fused [CLS]: 5 epochs, alpha 0.4 from the first step (SNLI-VE)."""
    return published("entailment", epochs=5, objective=DistillConfig(alpha_ramp_epochs=0.0))


def vqa() -> FinetuneConfig:
    """A decoder that writes answers: 8 epochs; questions keep 50 words (VQA v2)."""
    slow = OptimConfig(lr=2e-5, min_lr=1e-6, warmup_steps=400)
    return published("vqa", epochs=8, max_words=50, max_tokens=50, optim=slow)


def text_assignment() -> FinetuneConfig:
    """Which of two pictures has the caption: 1 epoch on pre-training's captions, before NLVR2."""
    return published(
        "text-assignment",
        epochs=1,
        batch_size=512,
        augment=AugmentConfig(),
        max_tokens=25,
        optim=OptimConfig(lr=2e-5, min_lr=1e-5, warmup_steps=100),
        objective=DistillConfig(alpha=0.0),  # there is no teacher
    )


def nlvr2() -> FinetuneConfig:
    """True or false of two pictures: 10 epochs at batch 128 (NLVR2), after text assignment."""
    return published("nlvr2", epochs=10, batch_size=128)


FINETUNE = {
    "retrieval": retrieval,
    "entailment": entailment,
    "vqa": vqa,
    "text-assignment": text_assignment,
    "nlvr2": nlvr2,
    "grounding": grounding,
}
