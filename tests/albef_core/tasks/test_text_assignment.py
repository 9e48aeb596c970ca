"""Text assignment agrees with the official code; its draws have the chances that they should."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, Recipe, corrected, paper_2021
from albef_core.model import ALBEF
from albef_core.official import from_official, num_text_layers, our_name
from albef_core.pair_encoder import in_pairs
from albef_core.tasks.text_assignment import (
    LABELS,
    Assignment,
    AssignmentModel,
    assignment_step,
    draw_assignment,
    start_assignment,
)
from albef_core.weights import apply_weights
from tests.albef_core import literal
from tests.albef_core.replay import named, read_json
from tests.albef_core.tasks.recording import (
    LIMITS,
    Recording,
    as_official,
    check_gradients,
    full_size,
    num_parameters,
    our_names,
)
from tests.albef_core.test_official import FULL_SIZE, recorded_states, shapes
from tests.albef_core.test_pretraining_golden import assert_near
from tests.golden_folder import GOLDEN, needs_golden

TEACHER_LAYER = r"^teacher\.multimodal_encoder\.layers\.(\d+)\."


def halved(match: re.Match) -> str:
    return f"teacher.multimodal_encoder.layers.{int(match[1]) // 2}."


def batch_of(recorded: dict[str, Tensor], dtype: torch.dtype) -> PairBatch:
    return PairBatch(
        images=recorded["image"].to(dtype),
        token_ids=recorded["input_ids"],
        attention_mask=recorded["attention_mask"].bool(),
        masked_ids=recorded["input_ids"],
        mlm_labels=torch.full_like(recorded["input_ids"], -100),
        image_ids=torch.arange(len(recorded["image"])),
    )


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("recipe", [corrected(), paper_2021()], ids=["corrected", "paper-2021"])
def test_a_step_agrees_with_the_official_one(dtype: torch.dtype, recipe: Recipe) -> None:
    recording = Recording(GOLDEN / "nlvr_pretrain")
    recorded, scalars = recording.tensors, recording.scalars
    student = AssignmentModel(recording.sizes)
    recording.load(student=student, teacher=None)
    student.to(dtype)
    drawn = Assignment(
        first=recorded["image0_idx"], second=recorded["image1_idx"], labels=recorded["labels"]
    )
    for name in ("image0_idx", "image1_idx", "labels"):
        assert recorded[name].tolist() == scalars[name]
    step = assignment_step(
        student,
        batch_of(recorded, dtype),
        recipe=recipe,
        draw=lambda *_: drawn,
    )
    step.loss.backward()
    is_double = dtype == torch.float64
    loss = scalars["loss_float64" if is_double else "loss"]
    assert step.loss.item() == pytest.approx(loss, rel=LIMITS[dtype])
    assert_near(step.image_tokens, recorded["image_embeds"], 1e-4, "image_embeds")
    assert_near(step.similarity, recorded["sim"], 1e-4, "sim")
    assert_near(step.logits, recorded["pred"], 1e-4, "pred")
    weights = step.weights
    if recipe == corrected():  # cut before the softmax and not after it: the same but for a factor
        weights = weights * (1 - step.similarity.softmax(dim=1).diagonal())[:, None]
    assert_near(weights, recorded["weights"], 1e-4, "weights")
    norms = recording.by_our_names(scalars["grad_norm"])
    check_gradients(student, norms, torch.float32)
    if is_double:
        norms = recording.by_our_names(scalars["grad_norm_float64"])
        check_gradients(student, norms, torch.float64)


@needs_golden
def test_the_recorded_draws_follow_the_rule_that_ours_follow() -> None:
    """The official label and images are ours: one number chooses among three equal thirds."""
    recording = Recording(GOLDEN / "nlvr_pretrain")
    raw = recording.scalars
    coins, images = iter(raw["rand_results"]), iter(raw["multinomial_results"])
    for row, label in enumerate(raw["labels"]):
        drawn = None
        if next(coins)[0] > 1 / 3:
            drawn = 0 if next(coins)[0] > 0.5 else 1
        others = next(images)
        first, second = raw["image0_idx"][row], raw["image1_idx"][row]
        if drawn is None:
            assert (label, first, second) == (2, *others)
            assert row not in (first, second)
        else:
            pair = (row, others[0]) if drawn == 0 else (others[0], row)
            assert (label, first, second) == (drawn, *pair)


@needs_golden
def test_an_official_checkpoint_at_full_size_loads_and_saves_key_for_key() -> None:
    recorded, sizes = full_size("nlvr_pretrain")
    with torch.device("meta"):
        student = AssignmentModel(sizes)
    assert shapes(as_official(student, None, like=recorded)) == shapes(recorded)
    report = apply_weights(student, from_official(recorded), source="nlvr_pretrain")
    assert not report.missing
    assert not report.unexpected
    counts = read_json(FULL_SIZE / "models.json")["nlvr_pretrain"]
    assert num_parameters(student) == counts["parameters_unique"]


@needs_golden
def test_pre_trained_weights_start_what_they_start_in_the_official_code() -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")["nlvr_pretrain"]
    _, sizes = full_size("nlvr_pretrain")
    with torch.device("meta"):
        student = AssignmentModel(sizes)
    pretrained = from_official(recorded_states()["pretrain"])
    report = start_assignment(student, pretrained, source="pretrain")
    assert set(report.missing) == our_names(conversion["missing"])
    # The official script doubles the teacher's layers too before it leaves them.
    doubled = our_names(conversion["unexpected"])
    assert set(report.unexpected) == {re.sub(TEACHER_LAYER, halved, name) for name in doubled}
    state = {name for name in student.state_dict() if not name.startswith("assignment_head.")}
    assert state == our_names(conversion["loaded"])


@needs_golden
def test_each_weight_starts_from_the_one_that_feeds_it_in_the_official_code() -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")["nlvr_pretrain"]["loaded"]
    official = recorded_states()["pretrain"]
    pretrained = from_official(official)
    paired, layers = in_pairs(pretrained), num_text_layers(official)
    for key, source in conversion.items():
        name = our_name(key, text_layers=layers)
        if name is not None:
            assert paired[name] is pretrained[str(our_name(source, text_layers=layers))], key


def test_it_starts_from_pre_training_and_keeps_projections_and_temperature_still(
    tiny_config: ModelConfig, tiny_model: ALBEF
) -> None:
    student = AssignmentModel(tiny_config)
    report = start_assignment(student, tiny_model.state_dict(), source="here")
    assert report.missing == ("assignment_head.weight", "assignment_head.bias")
    still = {name for name, p in student.named_parameters() if not p.requires_grad}
    sides = ("image_projection", "text_projection")
    assert still == {f"{s}.{kind}" for s in sides for kind in ("weight", "bias")} | {"temperature"}
    for name in still:
        assert torch.equal(named(student)[name], named(tiny_model)[name]), name


def draws(weights: Tensor, *, num: int) -> dict[tuple[int, int, int], float]:
    """Count what is drawn for the text of image 0 over `num` seeds: (label, first, second)."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(3, num, generator=generator, dtype=torch.float64)
    own, both = torch.zeros(num, dtype=torch.int64), torch.ones(num, dtype=torch.bool)
    drawn = draw_assignment(weights.expand(num, -1), own, both, numbers)
    rows = torch.stack([drawn.labels, drawn.first, drawn.second], dim=1)
    found, counts = rows.unique(dim=0, return_counts=True)
    return {
        (label, first, second): count / num
        for (label, first, second), count in zip(found.tolist(), counts.tolist(), strict=True)
    }


def test_labels_are_equally_likely_and_images_as_likely_as_they_weigh() -> None:
    shares = [0.0, 0.6, 0.3, 0.1]  # image 0 is the text's own
    expected = {}
    for other, share in enumerate(shares[1:], start=1):
        expected[0, 0, other] = expected[1, other, 0] = share / 3
        for another, rest in enumerate(shares[1:], start=1):
            if another != other:  # drawn without putting the first back
                expected[2, other, another] = share * rest / (1 - share) / 3
    found = draws(torch.tensor(shares), num=60_000)
    assert found.keys() == expected.keys()
    for case, chance in expected.items():
        deviation = np.sqrt(chance * (1 - chance) / 60_000)
        assert abs(found[case] - chance) < 5 * deviation, case


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0.0, 0.0, 0.0], (0, 0, 1)),
        ([0.3333, 0.9, 0.0], (0, 0, 2)),
        ([0.3334, 0.9, 0.0], (1, 2, 0)),
        ([0.6666, 0.0, 0.0], (1, 1, 0)),
        ([0.6667, 0.0, 0.0], (2, 1, 2)),
        ([0.9999, 0.9, 0.9], (2, 2, 1)),
    ],
)
def test_a_draw_worked_out_by_hand(numbers: list[float], expected: tuple[int, int, int]) -> None:
    column = torch.tensor(numbers, dtype=torch.float64)[:, None]
    weights, own = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([0])
    drawn = draw_assignment(weights, own, torch.tensor([True]), column)
    assert (int(drawn.labels), int(drawn.first), int(drawn.second)) == expected


@pytest.fixture
def model(tiny_config: ModelConfig, randomize: Callable) -> AssignmentModel:
    return randomize(AssignmentModel(tiny_config))


def test_the_weights_are_the_softmax_over_the_other_images(
    model: AssignmentModel, make_pairs: Callable[..., PairBatch]
) -> None:
    batch = make_pairs([3, 4, 5])
    step = assignment_step(model, batch, recipe=paper_2021(), draw=drawn_by_hand)
    tokens = model.image_encoder(batch.images)[:, 0]
    features = model.image_projection(tokens).detach().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for row, weights in enumerate(step.weights):
        expected = literal.softmax(list(features[row] @ features.T / 0.07))
        expected[row] = 0.0
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4, atol=1e-7)


def drawn_by_hand(weights: Tensor, own: Tensor, *_: Tensor) -> Assignment:
    return Assignment(first=own, second=own.flip(0), labels=torch.zeros_like(own))


def test_another_picture_of_the_same_photograph_is_never_the_other_image(
    model: AssignmentModel, make_pairs: Callable[..., PairBatch]
) -> None:
    batch = make_pairs([7, 7, 8, 9])
    for seed in range(20):
        step = assignment_step(model, batch, recipe=corrected(), seed=seed)
        for row, label in enumerate(step.labels.tolist()):
            ids = [
                int(batch.image_ids[i[row]])
                for i in (step.assignment.first, step.assignment.second)
            ]
            own = int(batch.image_ids[row])
            assert [place for place, image in enumerate(ids) if image == own] == (
                [] if label == LABELS.index("neither") else [label]
            )
    published = assignment_step(model, batch, recipe=paper_2021(), seed=0)
    assert published.weights[0, 1] > 0


def test_a_text_without_two_other_images_is_left_out(
    model: AssignmentModel, make_pairs: Callable[..., PairBatch]
) -> None:
    step = assignment_step(model, make_pairs([7, 7, 7]), recipe=corrected())
    assert not step.counts.any()
    assert step.loss.item() == 0
    step = assignment_step(model, make_pairs([7, 7, 8, 9]), recipe=corrected(), seed=3)
    assert step.counts.all()
    step = assignment_step(model, make_pairs([7, 7, 8]), recipe=corrected(), seed=3)
    assert step.counts.tolist() == [False, False, True]
    expected = nn.functional.cross_entropy(step.logits[2:], step.labels[2:])
    torch.testing.assert_close(step.loss, expected)


def test_a_batch_of_one_teaches_nothing_or_stops_as_published(
    model: AssignmentModel, make_pairs: Callable[..., PairBatch]
) -> None:
    step = assignment_step(model, make_pairs([7]), recipe=corrected())
    step.loss.backward()
    assert step.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(RuntimeError, match="no candidate"):
        assignment_step(model, make_pairs([7]), recipe=paper_2021())


def test_a_draw_of_two_others_from_one_stops_as_published() -> None:
    weights, own = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    numbers = torch.tensor([[0.9], [0.5], [0.5]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no candidate"):
        draw_assignment(weights, own, torch.tensor([True]), numbers)


def test_draws_and_dropout_depend_on_seed_and_place_and_not_on_the_micro_batch(
    tiny_config: ModelConfig, make_pairs: Callable[..., PairBatch], randomize: Callable
) -> None:
    model = randomize(AssignmentModel(replace(tiny_config, dropout=0.3)))
    batch = make_pairs([3, 4, 5, 6, 7])
    whole = assignment_step(model, batch, recipe=corrected(), seed=5)
    parts = assignment_step(model, batch, recipe=corrected(), seed=5, micro_batch_size=2)
    other = assignment_step(model, batch, recipe=corrected(), seed=6)
    torch.testing.assert_close(parts.logits, whole.logits)
    assert torch.equal(parts.labels, whole.labels)
    assert (other.logits - whole.logits).abs().max() > 1e-3
