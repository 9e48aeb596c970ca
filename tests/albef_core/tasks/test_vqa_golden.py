"""VQA agrees with the official code, number by number: a training step, and three rankings."""

from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from albef_core.config import ModelConfig, corrected, paper_2021
from albef_core.official import from_official, num_text_layers, our_name, to_official
from albef_core.tasks.vqa import (
    NOT_FOR_VQA,
    VqaBatch,
    VqaModel,
    VqaStep,
    from_pretraining,
    vqa_step,
)
from albef_core.tasks.vqa_answers import RankedAnswers, rank_answers
from albef_core.teacher import follow, frozen_copy
from albef_core.weights import apply_weights
from tests.albef_core.replay import named, read_json, sizes_of
from tests.albef_core.test_official import recorded_states, shapes
from tests.albef_core.test_pretraining_golden import assert_near, check_norms, check_sums
from tests.golden_folder import GOLDEN, needs_golden

VQA = GOLDEN / "vqa"
FULL_SIZE = GOLDEN / "full_size"
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])

# Tensors are recorded in float32 only. Over the tensor's largest value, or the gradient's norm.
TENSORS, GRADIENTS = 1e-4, 1e-3
LOSSES = {torch.float64: 1e-8, torch.float32: 1e-4}
# Of each parameter's sum of absolute values.
SUMS = {torch.float64: 1e-6, torch.float32: 1e-5}


@cache
def config() -> dict[str, Any]:
    return read_json(VQA / "config.json")


def models(dtype: torch.dtype) -> tuple[VqaModel, VqaModel]:
    """The student and the teacher that the recording begins with."""
    sizes = sizes_of(config())
    assert config()["decoder"]["num_hidden_layers"] == sizes.fusion_layers
    state = from_official(load_file(VQA / "checkpoint_init.safetensors"))
    student = VqaModel(sizes).train()
    teacher = frozen_copy(student).train()
    apply_weights(student, state, source="recording", may_add=("teacher.",))
    own = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
    apply_weights(teacher, own, source="recording")
    return student.to(dtype), teacher.to(dtype)


def by_our_names(recorded: dict[str, Any]) -> dict[str, Any]:
    layers = config()["bert_config"]["fusion_layer"]
    ours = {our_name(key, text_layers=layers): value for key, value in recorded.items()}
    ours = {name.removeprefix("teacher."): value for name, value in ours.items()}
    ours.pop("answer_head.decoder.weight", None)
    return ours


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(VQA / "train" / "tensors.safetensors")


@pytest.fixture(scope="module")
def scalars() -> dict[str, Any]:
    return read_json(VQA / "train" / "scalars.json")


def batch_of(recorded: dict[str, Tensor], dtype: torch.dtype) -> VqaBatch:
    return VqaBatch(
        images=recorded["image"].to(dtype),
        question_ids=recorded["question_input_ids"],
        question_mask=recorded["question_attention_mask"].bool(),
        answer_ids=recorded["answer_input_ids"],
        answer_mask=recorded["answer_attention_mask"].bool(),
        weights=recorded["weights"].to(dtype),
        num_answers=recorded["n_answers"],
    )


def replay(
    recorded: dict[str, Tensor], dtype: torch.dtype, *, alpha: float
) -> tuple[VqaModel, VqaModel, VqaStep]:
    student, teacher = models(dtype)
    follow(teacher, student, momentum=config()["momentum"])
    batch = batch_of(recorded, dtype)
    step = vqa_step(student, teacher, batch, alpha=alpha)
    step.loss.backward()
    return student, teacher, step


@needs_golden
@BOTH
def test_losses_gradients_and_teacher_agree(
    recorded: dict[str, Tensor], scalars: dict[str, Any], dtype: torch.dtype
) -> None:
    student, teacher, step = replay(recorded, dtype, alpha=scalars["alpha"])
    assert scalars["k"] == recorded["n_answers"].tolist()
    assert step.loss.item() == pytest.approx(scalars["loss_float64"], rel=LOSSES[dtype])
    assert step.loss.item() == pytest.approx(scalars["loss"], rel=TENSORS)
    exact = torch.tensor(scalars["per_answer_loss_float64"], dtype=torch.float64)
    assert_near(step.answer_losses, exact, LOSSES[dtype], "per_answer_loss_float64")
    assert_near(step.answer_losses, recorded["per_answer_loss"], TENSORS, "per_answer_loss")
    check_norms(named(student), by_our_names(scalars["grad_norm"]), GRADIENTS)
    sums = by_our_names(scalars["momentum_after_sums"])
    assert sums.keys() == named(teacher).keys()
    check_sums(named(teacher), sums, SUMS[dtype], lr=0.0)


@needs_golden
@BOTH
def test_without_distillation_losses_and_gradients_agree(
    recorded: dict[str, Tensor], scalars: dict[str, Any], dtype: torch.dtype
) -> None:
    student, _, step = replay(recorded, dtype, alpha=0.0)
    assert step.loss.item() == pytest.approx(scalars["loss_no_distill"], rel=TENSORS)
    name = "per_answer_loss_no_distill"
    assert_near(step.answer_losses, recorded[name], TENSORS, name)
    norms = by_our_names(scalars["grad_norm_no_distill"])
    assert norms.keys() == named(student).keys()
    check_norms(named(student), norms, GRADIENTS)


@needs_golden
@BOTH
def test_states_targets_and_logits_agree(recorded: dict[str, Tensor], dtype: torch.dtype) -> None:
    student, teacher, step = replay(recorded, dtype, alpha=0.4)
    batch = batch_of(recorded, dtype)
    questions = batch.question_ids, batch.question_mask
    states = student.encode_question(batch.images, *questions)
    # Nothing reads the padding; the recording was made with another [PAD] vector than it stores.
    seen, expected = batch.question_mask, recorded["question_states"]
    assert_near(states[seen], expected[seen], TENSORS, "question_states")

    rows = torch.arange(len(batch)).repeat_interleave(batch.num_answers)
    beside = states[rows], batch.question_mask[rows]
    read = student.decode(batch.answer_ids, batch.answer_mask, *beside)
    assert_near(student.answer_head(read), recorded["decoder_logits"], TENSORS, "decoder_logits")

    is_predicted = batch.answer_mask[:, 1:]
    assert torch.equal(is_predicted, recorded["answer_targets"][:, 1:] != -100)
    assert torch.equal(step.labels, recorded["answer_targets"][:, 1:][is_predicted])
    expected = recorded["decoder_logits"][:, :-1][is_predicted]
    assert_near(step.logits, expected, TENSORS, "logits of the step")
    expected = recorded["teacher_logits_shifted"][is_predicted]
    assert_near(step.teacher_logits, expected, TENSORS, "teacher_logits_shifted")

    beside = teacher.encode_question(batch.images, *questions)[rows], batch.question_mask[rows]
    read = teacher.decode(batch.answer_ids[:, :-1], batch.answer_mask[:, :-1], *beside)
    expected = recorded["teacher_logits_shifted"]
    assert_near(teacher.answer_head(read), expected, TENSORS, "teacher_logits_shifted, all")


def rank(recorded: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> RankedAnswers:
    student, _ = models(dtype)
    return rank_answers(
        student.eval(),
        recorded["image"].to(dtype),
        recorded["question_input_ids"],
        recorded["question_attention_mask"].bool(),
        recorded["answer_input_ids"],
        recorded["answer_attention_mask"].bool(),
        **options,
    )


@pytest.fixture(scope="module")
def ranking() -> dict[str, Tensor]:
    return load_file(VQA / "rank" / "tensors.safetensors")


def recorded_k(ranking: dict[str, Tensor]) -> list[int]:
    return sorted(int(name.removeprefix("topk_ids_k")) for name in ranking if "topk_ids" in name)


def by_answer(ids: Tensor, values: Tensor) -> Tensor:
    """Sort a question's candidates by their places in the list."""
    return values.flatten(1).gather(1, ids.argsort(dim=1))


@needs_golden
@BOTH
def test_the_first_stage_agrees(ranking: dict[str, Tensor], dtype: torch.dtype) -> None:
    student, _ = models(dtype)
    mask = ranking["question_attention_mask"].bool()
    states = student.encode_question(
        ranking["image"].to(dtype), ranking["question_input_ids"], mask
    )
    begin = ranking["start_ids"]
    assert (ranking["answer_input_ids"][:, 0] == begin[0, 0]).all()
    logits = student.answer_head(student.decode(begin, begin >= 0, states, mask)[:, 0])
    assert_near(logits, ranking["first_token_logits"], TENSORS, "first_token_logits")
    found = rank(ranking, dtype, top_k=1, recipe=paper_2021()).first_token_log_probabilities
    assert_near(found.exp(), ranking["prob_first_token"], TENSORS, "prob_first_token")


@needs_golden
@BOTH
def test_the_ranking_agrees_at_every_k(ranking: dict[str, Tensor], dtype: torch.dtype) -> None:
    sizes = recorded_k(ranking)
    assert config()["k_test"] in sizes
    for k in sizes:
        found = rank(ranking, dtype, top_k=k, recipe=paper_2021(), batch_size=7)
        first_ids = ranking[f"first_stage_ids_k{k}"]
        assert torch.equal(found.answers.sort(dim=1).values, first_ids.sort(dim=1).values)
        losses = by_answer(found.answers, -found.log_likelihoods)
        expected = by_answer(first_ids, ranking[f"answer_loss_k{k}"])
        assert_near(losses, expected, TENSORS, f"answer_loss_k{k}")
        scores = by_answer(found.answers, found.scores)
        expected = by_answer(first_ids, ranking[f"log_probs_sum_k{k}"])
        assert_near(scores, expected, TENSORS, f"log_probs_sum_k{k}")
        assert torch.equal(found.answers, ranking[f"topk_ids_k{k}"]), k
        assert_near(found.probabilities, ranking[f"topk_probs_k{k}"], TENSORS, f"topk_probs_k{k}")


@needs_golden
def test_the_recorded_choice_agrees(ranking: dict[str, Tensor]) -> None:
    recorded = read_json(VQA / "rank" / "rank.json")
    found = rank(ranking, torch.float32, top_k=recorded["k"], recipe=paper_2021())
    assert found.answers.tolist() == recorded["topk_ids"]
    assert found.answers[:, 0].tolist() == recorded["best"]
    assert_near(found.probabilities, torch.tensor(recorded["topk_probs"]), TENSORS, "topk_probs")


@needs_golden
def test_mended_the_ranking_is_by_the_recorded_losses_alone(ranking: dict[str, Tensor]) -> None:
    k = max(recorded_k(ranking))
    found = rank(ranking, torch.float64, top_k=k, recipe=corrected())
    losses, ids = ranking[f"answer_loss_k{k}"][..., 0], ranking[f"first_stage_ids_k{k}"]
    assert torch.equal(found.answers, ids.gather(1, losses.argsort(dim=1)))
    assert torch.equal(found.scores, found.log_likelihoods)


@needs_golden
def test_the_official_checkpoint_comes_back_from_our_modules() -> None:
    file = load_file(VQA / "checkpoint_init.safetensors")
    student, teacher = models(torch.float32)
    layers = config()["bert_config"]["fusion_layer"]
    official = official_keys(student, teacher, text_layers=layers)
    assert shapes(official) == shapes(file)
    for key, tensor in file.items():
        assert torch.equal(official[key], tensor), key


def official_keys(student: VqaModel, teacher: VqaModel, *, text_layers: int) -> dict[str, Tensor]:
    state = student.state_dict()
    state |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    return to_official(state, text_layers=text_layers, has_mlm_head=False)


@needs_golden
def test_at_full_size_keys_shapes_and_parameters_are_the_official_ones() -> None:
    recorded, counts = recorded_states()["vqa"], read_json(FULL_SIZE / "models.json")["vqa"]
    num_patches = recorded["visual_encoder.pos_embed"].shape[1] - 1
    sizes = ModelConfig(image_size=16 * int(num_patches**0.5))
    with torch.device("meta"):
        student = VqaModel(sizes)
    teacher = frozen_copy(student)
    ours = official_keys(student, teacher, text_layers=num_text_layers(recorded))
    assert shapes(ours) == shapes(recorded)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == counts["parameters_trainable"]
    assert 2 * count == counts["parameters_unique"]


@needs_golden
def test_a_pre_trained_checkpoint_starts_what_it_starts_officially() -> None:
    conversion = read_json(FULL_SIZE / "checkpoint_conversion.json")["vqa"]
    pretrained = recorded_states()["pretrain"]
    layers = num_text_layers(pretrained)
    # Numbered, so that it can be seen which weight went where.
    numbers = {key: torch.tensor(float(n)).expand(2, 2) for n, key in enumerate(pretrained)}
    started = from_pretraining(from_official(numbers))
    for key, source in conversion["loaded"].items():
        name = our_name(key, text_layers=layers)
        if name is not None and not key.endswith("cls.predictions.bias"):
            source = source.replace("cls.predictions.bias", "cls.predictions.decoder.bias")
            assert torch.equal(started[name], numbers[source]), key
    reached = {our_name(key, text_layers=layers) for key in conversion["loaded"]}
    left = {name for name in started if name not in reached}
    expected = {our_name(key, text_layers=layers) for key in conversion["unexpected"]}
    assert left == expected
    assert all(any(part in name for part in NOT_FOR_VQA) for name in left)
    assert not conversion["missing"]
