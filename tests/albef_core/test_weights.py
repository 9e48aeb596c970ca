"""Weights come back bit by bit; a file that does not fit is refused in one line naming it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from albef_core.batch import PairBatch
from albef_core.config import ModelConfig, ObjectiveConfig, TextConfig, corrected, paper_2021
from albef_core.feature_queue import Queues
from albef_core.image_encoder import resize_position_embeddings
from albef_core.model import ALBEF
from albef_core.official import num_text_layers, official_name, our_name
from albef_core.teacher import Teacher
from albef_core.tokenizer import Tokenizer
from albef_core.weights import (
    apply_weights,
    load_model,
    read_official,
    read_tensors,
    save_model,
    save_official,
)
from tests.albef_core.test_official import recorded_states
from tests.albef_core.weight_checks import assert_equal, named, refusal
from tests.golden_folder import needs_golden

TOKENIZER = Tokenizer.learn(["a brown dog runs over the green grass"], vocab_size=60)
TEXT = TextConfig(tokenizer="corpus", max_tokens=9)


@pytest.fixture
def queues(tiny_config: ModelConfig) -> Queues:
    return Queues(tiny_config, ObjectiveConfig(num_slots=5), paper_2021())


@pytest.fixture
def saved_model(tmp_path: Path, tiny_model: ALBEF, tiny_config: ModelConfig) -> Path:
    save_model(
        tmp_path / "model",
        tiny_model,
        model_config=tiny_config,
        text_config=TEXT,
        recipe=corrected(),
        tokenizer=TOKENIZER,
    )
    return tmp_path / "model"


def test_a_saved_model_comes_back_bit_by_bit(
    saved_model: Path, tiny_model: ALBEF, tiny_config: ModelConfig
) -> None:
    loaded = load_model(saved_model)
    assert_equal(named(loaded.model), named(tiny_model))
    assert loaded.model_config == tiny_config
    assert loaded.text_config == TEXT
    assert loaded.recipe == corrected()
    assert loaded.report.matched == len(named(tiny_model))
    assert loaded.report.missing == loaded.report.unexpected == ()
    words = ["the dog runs"]
    arguments = {"max_tokens": 9, "keep_sep": True}
    assert (
        loaded.tokenizer.encode(words, **arguments).tolist()
        == TOKENIZER.encode(words, **arguments).tolist()
    )


def test_a_loaded_model_encodes_as_the_saved_one(
    saved_model: Path, tiny_model: ALBEF, pairs: PairBatch
) -> None:
    loaded = load_model(str(saved_model)).model
    assert torch.equal(
        loaded.encode_image(pairs.images)[1], tiny_model.encode_image(pairs.images)[1]
    )


def test_our_file_holds_official_names_each_tensor_once(saved_model: Path) -> None:
    state = load_file(saved_model / "model.safetensors")
    layers = num_text_layers(state)
    names = [our_name(key, text_layers=layers) for key in state]
    assert len(set(names)) == len(names)
    assert "visual_encoder.cls_token" in state
    assert None not in names


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", "{ not json"),
        ("config.json", '{"format": 99}'),
        ("config.json", '{"format": 1}'),
        ("config.json", '{"format": 1, "model": {"wheels": 4}, "text": {}, "recipe": {}}'),
        ("config.json", "[]"),
        ("model.safetensors", None),
        ("model.safetensors", "no tensors"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_folder_is_refused_naming_the_file(
    saved_model: Path, file: str, content: str | None
) -> None:
    path = saved_model / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    refusal(lambda: load_model(saved_model), file)


def test_a_folder_with_foreign_weights_is_refused(saved_model: Path) -> None:
    path = saved_model / "model.safetensors"
    save_file({"resnet.conv1.weight": torch.zeros(2)}, path)
    refusal(lambda: load_model(saved_model), path, "resnet.conv1.weight")


@pytest.fixture
def official_file(
    tmp_path: Path,
    tiny_model: ALBEF,
    tiny_teacher: Teacher,
    queues: Queues,
    tiny_config: ModelConfig,
) -> Path:
    path = tmp_path / "ALBEF.pth"
    save_official(path, tiny_model, tiny_teacher, queues, tiny_config)
    return path


def test_an_official_checkpoint_comes_back_bit_by_bit(
    official_file: Path, tiny_model: ALBEF, tiny_teacher: Teacher, queues: Queues
) -> None:
    state = read_official(official_file)
    expected = dict(tiny_model.state_dict())
    expected |= {f"teacher.{name}": value for name, value in tiny_teacher.state_dict().items()}
    expected["queues.image.features"] = queues.image.features
    expected["queues.text.features"] = queues.text.features
    expected["queues.pointer"] = queues.image.pointer.reshape(1)
    assert_equal(state, expected)


@needs_golden
def test_a_written_checkpoint_has_the_recorded_keys_but_for_its_depth(
    official_file: Path, tmp_path: Path
) -> None:
    """Layers of the same kind repeat, so that names are compared without their numbers."""

    def without_depth(keys: list[str], text_layers: int) -> set[str]:
        kinds = set()
        for key in keys:
            head, dot, rest = key.partition("encoder.layer.")
            if dot:
                number, _, part = rest.partition(".")
                half = "text" if int(number) < text_layers else "multimodal"
                kinds.add(f"{head}{half}.{part}")
            elif "blocks." in key:
                head, _, rest = key.partition("blocks.")
                kinds.add(head + rest.partition(".")[2])
            else:
                kinds.add(key)
        return kinds

    recorded = recorded_states()["pretrain"]
    written = torch.load(official_file, weights_only=True)
    assert written.keys() == {"model"}
    ours, theirs = list(written["model"]), list(recorded)
    assert without_depth(ours, num_text_layers(ours)) == without_depth(
        theirs, num_text_layers(theirs)
    )


def test_the_official_duplicates_are_written_alike(official_file: Path) -> None:
    state = torch.load(official_file, weights_only=True)["model"]
    for model in ("text_encoder", "text_encoder_m"):
        words = state[f"{model}.bert.embeddings.word_embeddings.weight"]
        assert torch.equal(state[f"{model}.cls.predictions.decoder.weight"], words)
        bias = state[f"{model}.cls.predictions.bias"]
        assert torch.equal(state[f"{model}.cls.predictions.decoder.bias"], bias)
        positions = state[f"{model}.bert.embeddings.position_ids"]
        count = len(state[f"{model}.bert.embeddings.position_embeddings.weight"])
        assert positions.tolist() == [list(range(count))]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "epoch": 3}])
def test_a_checkpoint_is_read_bare_or_wrapped_in_model(
    official_file: Path, wrap: Callable[[dict], dict]
) -> None:
    state = torch.load(official_file, weights_only=True)["model"]
    expected = read_official(official_file)
    torch.save(wrap(state), official_file)
    assert_equal(read_official(official_file), expected)


def test_an_official_checkpoint_is_loaded_as_a_model(
    tmp_path: Path, head_wide_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    config = replace(head_wide_config, vocab_size=TOKENIZER.vocab_size)
    student = make_model(config)
    queues = Queues(config, ObjectiveConfig(num_slots=5), paper_2021())
    save_official(tmp_path / "ALBEF.pth", student, Teacher(config, student), queues, config)
    TOKENIZER.save(tmp_path)
    loaded = load_model(tmp_path / "ALBEF.pth")
    assert_equal(named(loaded.model), named(student))
    assert loaded.model_config == config
    assert loaded.tokenizer.vocab_size == TOKENIZER.vocab_size
    assert not loaded.recipe.keep_sep
    assert loaded.report.missing == ()
    assert all(name.startswith(("teacher.", "queues.")) for name in loaded.report.unexpected)


def test_a_retrieval_checkpoint_lacks_the_mlm_head_and_says_so(
    tmp_path: Path, head_wide_config: ModelConfig, make_model: Callable[..., ALBEF]
) -> None:
    student = make_model(head_wide_config)
    state = {
        official_name(name, text_layers=1, has_mlm_head=False): value
        for name, value in named(student).items()
        if not name.startswith("mlm_head.")
    }
    state["idx_queue"] = torch.full((1, 5), -100)
    torch.save({"model": state}, tmp_path / "checkpoint_best.pth")
    TOKENIZER.save(tmp_path)
    loaded = load_model(tmp_path / "checkpoint_best.pth")
    assert all(name.startswith("mlm_head.") for name in loaded.report.missing)
    assert len(loaded.report.missing) == 5
    assert loaded.report.matched == len(state) - 1
    kept = {n: v for n, v in named(loaded.model).items() if not n.startswith("mlm_head.")}
    assert_equal(kept, {n: v for n, v in named(student).items() if n in kept})


@pytest.mark.parametrize("image_size", [8, 32])
def test_a_checkpoint_is_loaded_at_another_resolution(
    official_file: Path,
    tiny_model: ALBEF,
    tiny_config: ModelConfig,
    make_model: Callable[..., ALBEF],
    image_size: int,
) -> None:
    resized = make_model(replace(tiny_config, image_size=image_size), seed=5)
    state = read_official(official_file)
    apply_weights(resized, state, source="file", may_add=("teacher.", "queues."))
    expected = named(tiny_model)
    expected["image_encoder.pos_embed"] = resize_position_embeddings(
        expected["image_encoder.pos_embed"],
        num_patches=(image_size // tiny_config.patch_size) ** 2,
    )
    assert_equal(named(resized), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"weights{suffix}"
    state = {"weight": torch.randn(500, generator=torch.Generator().manual_seed(0))}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refusal(lambda: read_tensors(path), path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40), suffix=st.sampled_from([".pth", ".bin", ".safetensors"]))
def test_a_file_of_anything_is_refused_in_one_line(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refusal(lambda: read_tensors(path), path)


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "ALBEF.pth", tmp_path / "was-run"
    torch.save({"model": {"temp": Bomb(target)}}, path)
    refusal(lambda: read_official(path), path)
    assert not target.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"temp": 0.07}}, torch.zeros(2), {0: "x"}])
def test_a_file_without_a_dict_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "ALBEF.pth"
    torch.save(content, path)
    refusal(lambda: read_official(path), path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refusal(lambda: load_model(tmp_path / "ALBEF.pth"), tmp_path / "ALBEF.pth")


def test_an_official_file_with_an_unknown_key_is_refused_naming_it(official_file: Path) -> None:
    state = torch.load(official_file, weights_only=True)
    key = "text_encoder.bert.encoder.layer.0.attention.self.rotary.weight"
    state["model"][key] = torch.zeros(1)
    torch.save(state, official_file)
    refusal(lambda: read_official(official_file), official_file, key)


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vqa.pth"
    torch.save({"text_decoder.cls.predictions.bias": torch.zeros(3)}, path)
    refusal(lambda: load_model(path), path, "image_encoder.patch_embed.proj.weight")


def test_a_checkpoint_with_heads_of_another_width_is_refused(official_file: Path) -> None:
    refusal(lambda: load_model(official_file), official_file, "heads")


def test_a_missing_key_is_refused_naming_it(tiny_model: ALBEF, make_model: Callable) -> None:
    state = named(make_model(seed=1))
    del state["itm_head.bias"]
    refusal(lambda: apply_weights(tiny_model, state, source="a.pth"), "a.pth", "itm_head.bias")


def test_an_unexpected_key_is_refused_naming_it(tiny_model: ALBEF) -> None:
    state = named(tiny_model) | {"adapter.weight": torch.zeros(1)}
    refusal(lambda: apply_weights(tiny_model, state, source="a.pth"), "a.pth", "adapter.weight")


def test_a_key_of_another_size_is_refused_with_both_shapes(tiny_model: ALBEF) -> None:
    state = named(tiny_model) | {"itm_head.bias": torch.zeros(3)}
    refusal(
        lambda: apply_weights(tiny_model, state, source="a.pth"),
        *("a.pth", "itm_head.bias", "[3]", "[2]"),
    )


def test_of_many_misfits_three_are_named_and_the_rest_counted(tiny_model: ALBEF) -> None:
    message = refusal(lambda: apply_weights(tiny_model, {}, source="a.pth"), "a.pth")
    num_others = len(named(tiny_model)) - 3
    assert f"and {num_others} more" in message


def test_a_shared_weight_may_come_under_one_of_its_names_or_under_both() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    once = {"0.weight": torch.ones(2, 2), "1.bias": torch.ones(2)}
    twice = once | {"1.weight": torch.ones(2, 2)}
    for state in (once, twice):
        torch.nn.init.zeros_(model[0].weight)
        report = apply_weights(model, state, source="here")
        assert (report.matched, report.missing, report.unexpected) == (2, (), ())
        assert torch.equal(model[1].weight, torch.ones(2, 2))
