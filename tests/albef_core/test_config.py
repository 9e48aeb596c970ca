"""A size or rate that cannot be is refused with its flag; recipes differ in every field."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from albef_core.config import (
    RECIPES,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    corrected,
    paper_2021,
)
from albef_core.errors import InputError

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "wrong", "flag"),
    [
        (ModelConfig, {"image_size": 250}, "--image-size"),
        (ModelConfig, {"image_size": 0}, "--image-size"),
        (ModelConfig, {"patch_size": -16}, "--patch-size"),
        (ModelConfig, {"image_width": 770}, "--image-width"),
        (ModelConfig, {"text_width": 770}, "--text-width"),
        (ModelConfig, {"image_heads": 0}, "--image-heads"),
        (ModelConfig, {"text_layers": 0}, "--text-layers"),
        (ModelConfig, {"fusion_layers": 0}, "--fusion-layers"),
        (ModelConfig, {"vocab_size": -1}, "--vocab-size"),
        (ModelConfig, {"image_mlp_ratio": 0.0}, "--image-mlp-ratio"),
        (ModelConfig, {"dropout": 1.0}, "--dropout"),
        (ModelConfig, {"dropout": NAN}, "--dropout"),
        (TextConfig, {"max_words": 0}, "--max-words"),
        (TextConfig, {"max_tokens": 2}, "--max-tokens"),
        (TextConfig, {"corpus_vocab_size": 5}, "--corpus-vocab-size"),
        (ObjectiveConfig, {"alpha": 1.5}, "--alpha"),
        (ObjectiveConfig, {"alpha": NAN}, "--alpha"),
        (ObjectiveConfig, {"alpha_ramp_epochs": -1.0}, "--alpha-ramp-epochs"),
        (ObjectiveConfig, {"alpha_ramp_epochs": INFINITE}, "--alpha-ramp-epochs"),
        (ObjectiveConfig, {"teacher_momentum": -0.1}, "--teacher-momentum"),
        (ObjectiveConfig, {"num_slots": 0}, "--num-slots"),
        (ObjectiveConfig, {"temperature": 0.0}, "--temperature"),
        (ObjectiveConfig, {"temperature": 0.6}, "--temperature"),
        (ObjectiveConfig, {"mask_share": 1.1}, "--mask-share"),
        (OptimConfig, {"lr": 0.0}, "--lr"),
        (OptimConfig, {"lr": NAN}, "--lr"),
        (OptimConfig, {"lr": INFINITE}, "--lr"),
        (OptimConfig, {"min_lr": 1.0}, "--min-lr"),
        (OptimConfig, {"warmup_lr": -1e-5}, "--warmup-lr"),
        (OptimConfig, {"warmup_steps": -1}, "--warmup-steps"),
        (OptimConfig, {"weight_decay": INFINITE}, "--weight-decay"),
        (OptimConfig, {"clip_norm": -1.0}, "--clip-norm"),
        (OptimConfig, {"beta1": 1.0}, "--beta1"),
        (OptimConfig, {"beta2": -0.1}, "--beta2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_naming_its_flag(
    config: type, wrong: dict[str, float], flag: str
) -> None:
    with pytest.raises(InputError) as refused:
        config(**wrong)
    message = str(refused.value)
    assert message.startswith(f"{flag} ")
    assert str(next(iter(wrong.values()))) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "edge"),
    [
        (ObjectiveConfig, {"alpha": 0.0, "mask_share": 1.0, "teacher_momentum": 1.0}),
        (ObjectiveConfig, {"temperature": 0.001, "num_slots": 1, "alpha_ramp_epochs": 0.0}),
        (OptimConfig, {"warmup_steps": 0, "min_lr": 0.0, "weight_decay": 0.0, "beta1": 0.0}),
        (OptimConfig, {"lr": 1e-3, "min_lr": 1e-3}),
        (ModelConfig, {"image_size": 16, "vocab_size": 0, "dropout": 0.0}),
        (TextConfig, {"max_words": 1, "max_tokens": 3}),
    ],
)
def test_the_edges_of_what_can_be_are_taken(config: type, edge: dict[str, float]) -> None:
    assert asdict(config(**edge)).items() >= edge.items()


def test_the_corrected_recipe_is_the_default_and_the_published_one_its_opposite() -> None:
    assert corrected() == Recipe()
    ours, published = asdict(corrected()), asdict(paper_2021())
    assert (ours.pop("negatives"), published.pop("negatives")) == ("global", "local")
    assert set(ours.values()) == {True}
    assert set(published.values()) == {False}
    assert {name: make() for name, make in RECIPES.items()} == {
        "corrected": corrected(),
        "paper-2021": paper_2021(),
    }


@pytest.mark.parametrize("config", [ModelConfig, TextConfig, Recipe, ObjectiveConfig, OptimConfig])
def test_a_config_cannot_be_changed(config: type) -> None:
    made = config()
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
