"""Named starting points of trainings: functions that return a complete config."""

from pathlib import Path

from albef_core.config import (
    DistillConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TextConfig,
)
from pipelines.config import AugmentConfig, FinetuneConfig, PretrainConfig

UNSET = Path("CORPUS")


def base() -> PretrainConfig:
    """The paper's model: ViT-B/16 at 256 px, BERT-base, queue 65,536."""
    return PretrainConfig(corpus=UNSET, epochs=30, precision="bf16")


def paper_4m() -> PretrainConfig:
    """The paper's first setting: COCO, VG, SBU, CC3M; 30 epochs at batch 512 on 8 GPUs."""
    return PretrainConfig(corpus=UNSET, epochs=30, batch_size=512, workers=8, precision="bf16")


def paper_14m() -> PretrainConfig:
    """The paper's second setting: the same with CC12M beside it."""
    return PretrainConfig(corpus=UNSET, epochs=30, batch_size=512, workers=8, precision="bf16")


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
        batch_size=64,
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
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=50, clip_norm=1.0),
    )


PRETRAIN = {
    "tiny": tiny,
    "small": small,
    "base": base,
    "paper-4m": paper_4m,
    "paper-14m": paper_14m,
}

INIT = "MODEL"
"""Stands for a model that the command names."""
CROP = AugmentConfig(crop_scale_min=0.5)


def retrieval() -> FinetuneConfig:
    """ITC and ITM on pairs, positives by image: 10 epochs at batch 256, rate 1e-5 (Flickr30k)."""
    return FinetuneConfig(
        task="retrieval",
        corpus=UNSET,
        init=INIT,
        epochs=10,
        batch_size=256,
        augment=CROP,
        max_words=30,
        max_tokens=30,
        optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=100),
        experiment="albef-retrieval",
        register="albef-retrieval",
    )


def grounding() -> FinetuneConfig:
    """The same from expressions, without boxes: 5 epochs at batch 256, rate 1e-5 (RefCOCO+)."""
    return FinetuneConfig(
        task="grounding",
        corpus=UNSET,
        init=INIT,
        epochs=5,
        batch_size=256,
        augment=AugmentConfig(crop_scale_min=0.5, flip=False),
        max_words=30,
        max_tokens=30,
        optim=OptimConfig(lr=1e-5, min_lr=1e-6, warmup_steps=100),
        experiment="albef-grounding",
        register="albef-grounding",
    )


def entailment() -> FinetuneConfig:
    """Three classes from the fused [CLS]: 5 epochs at batch 256, rate 2e-5 (SNLI-VE)."""
    return FinetuneConfig(
        task="entailment",
        corpus=UNSET,
        init=INIT,
        epochs=5,
        batch_size=256,
        augment=CROP,
        max_words=30,
        max_tokens=30,
        objective=DistillConfig(alpha_ramp_epochs=0.0),
        optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_steps=100),
        experiment="albef-entailment",
        register="albef-entailment",
    )


def vqa() -> FinetuneConfig:
    """A decoder that writes answers: 8 epochs at batch 256, rate 2e-5 (VQA v2)."""
    return FinetuneConfig(
        task="vqa",
        corpus=UNSET,
        init=INIT,
        epochs=8,
        batch_size=256,
        augment=CROP,
        max_words=50,
        max_tokens=50,
        optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_steps=400),
        experiment="albef-vqa",
        register="albef-vqa",
    )


def nlvr2() -> FinetuneConfig:
    """True or false of two pictures: 10 epochs at batch 128, rate 2e-5 (NLVR2)."""
    return FinetuneConfig(
        task="nlvr2",
        corpus=UNSET,
        init=INIT,
        epochs=10,
        batch_size=128,
        augment=CROP,
        max_words=40,
        max_tokens=40,
        optim=OptimConfig(lr=2e-5, min_lr=1e-6, warmup_steps=100),
        experiment="albef-nlvr2",
        register="albef-nlvr2",
    )


FINETUNE = {
    "retrieval": retrieval,
    "entailment": entailment,
    "vqa": vqa,
    "nlvr2": nlvr2,
    "grounding": grounding,
}
