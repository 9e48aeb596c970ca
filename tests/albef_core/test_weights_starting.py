"""Encoders start from published BERT and ViT files, or say in one line why they cannot."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from albef_core.config import ModelConfig
from albef_core.image_encoder import resize_position_embeddings
from albef_core.model import ALBEF
from albef_core.official import official_name
from albef_core.weights import load_image_weights, load_text_weights
from tests.albef_core.weight_checks import assert_equal, named, refusal


def deit_state(model: ALBEF, *, grid: int) -> dict[str, Tensor]:
    """A published DeiT file: the image encoder at another resolution, and a classifier."""
    state = dict(model.image_encoder.state_dict())
    width = state["pos_embed"].shape[-1]
    generator = torch.Generator().manual_seed(4)
    state["pos_embed"] = torch.randn(1, 1 + grid * grid, width, generator=generator)
    return state | {"head.weight": torch.zeros(1000, width), "head.bias": torch.zeros(1000)}


def bert_state(model: ALBEF, *, is_old: bool) -> dict[str, Tensor]:
    """A published BERT file: no cross-attention, a pooler and a sentence head of its own."""
    state = {"bert.embeddings.position_ids": torch.arange(12)[None]} if is_old else {}
    for name, value in named(model).items():
        if name.startswith(("text_encoder.", "multimodal_encoder.", "mlm_head.")):
            key = official_name(name, text_layers=1, has_mlm_head=True)
            key = key.removeprefix("text_encoder.")
            key = key.replace("predictions.decoder.bias", "predictions.bias")
            if is_old:
                key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
                key = key.replace("LayerNorm.bias", "LayerNorm.beta")
            if "crossattention" not in key:
                state[key] = value.clone()
    words = state["bert.embeddings.word_embeddings.weight"]
    width = words.shape[1]
    return state | {
        "cls.predictions.decoder.weight": words.clone(),
        "bert.pooler.dense.weight": torch.zeros(width, width),
        "bert.pooler.dense.bias": torch.zeros(width),
        "cls.seq_relationship.weight": torch.zeros(2, width),
        "cls.seq_relationship.bias": torch.zeros(2),
    }


@pytest.mark.parametrize(
    ("file", "is_old"), [("pytorch_model.bin", True), ("model.safetensors", False)]
)
def test_text_weights_come_from_a_local_bert_folder(
    tmp_path: Path,
    tiny_model: ALBEF,
    make_model: Callable[..., ALBEF],
    file: str,
    is_old: bool,
) -> None:
    pretrained = make_model(seed=3)
    state = bert_state(pretrained, is_old=is_old)
    if file.endswith(".bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    before = {name: value.clone() for name, value in named(tiny_model).items()}
    report = load_text_weights(tiny_model, str(tmp_path))
    theirs = named(pretrained)
    for name, value in named(tiny_model).items():
        in_bert = name.startswith(("text_encoder.", "multimodal_encoder.", "mlm_head."))
        in_bert = in_bert and "cross_attention" not in name
        assert torch.equal(value, theirs[name] if in_bert else before[name]), name
    num_cross = sum("cross_attention" in name for name in theirs)
    num_text = sum(name.startswith(("text_enc", "multimodal", "mlm_head")) for name in theirs)
    assert report.matched == num_text - num_cross
    assert len(report.missing) == num_cross
    assert len(report.unexpected) == 4
    assert str(report) == (
        f"{tmp_path / file}: {report.matched} matched, {num_cross} missing, 4 unexpected"
    )


def test_bert_without_its_mlm_head_is_refused(tmp_path: Path, tiny_model: ALBEF) -> None:
    state = bert_state(tiny_model, is_old=False)
    encoder = {key: value for key, value in state.items() if not key.startswith("cls.")}
    save_file(encoder, tmp_path / "model.safetensors")
    refusal(
        lambda: load_text_weights(tiny_model, str(tmp_path)),
        tmp_path / "model.safetensors",
        "mlm_head",
    )


def test_bert_of_another_width_is_refused(
    tmp_path: Path,
    tiny_model: ALBEF,
    tiny_config: ModelConfig,
    make_model: Callable[..., ALBEF],
) -> None:
    wider = make_model(replace(tiny_config, text_width=32))
    save_file(bert_state(wider, is_old=False), tmp_path / "model.safetensors")
    refusal(lambda: load_text_weights(tiny_model, str(tmp_path)), tmp_path, "[30, 32]", "[30, 24]")


def test_image_weights_come_from_a_local_deit_file_at_its_own_resolution(
    tmp_path: Path, tiny_model: ALBEF, make_model: Callable[..., ALBEF]
) -> None:
    pretrained = make_model(seed=3)
    state = deit_state(pretrained, grid=14)
    torch.save({"model": state}, tmp_path / "deit.pth")
    report = load_image_weights(tiny_model, str(tmp_path / "deit.pth"))
    expected = named(pretrained.image_encoder)
    expected["pos_embed"] = resize_position_embeddings(state["pos_embed"], num_patches=4)
    assert_equal(named(tiny_model.image_encoder), expected)
    assert report.matched == len(expected)
    assert report.missing == ()
    assert set(report.unexpected) == {"head.weight", "head.bias"}


def test_a_distilled_deit_is_refused_for_its_second_token(
    tmp_path: Path, tiny_model: ALBEF, make_model: Callable[..., ALBEF]
) -> None:
    state = deit_state(make_model(seed=3), grid=14)
    state["pos_embed"] = torch.cat([state["pos_embed"], state["pos_embed"][:, :1]], dim=1)
    torch.save(state, tmp_path / "deit.pth")
    refusal(
        lambda: load_image_weights(tiny_model, str(tmp_path / "deit.pth")), "pos_embed", "[1, 198,"
    )


def test_a_random_start_matches_nothing_and_moves_nothing(tiny_model: ALBEF) -> None:
    before = {name: value.clone() for name, value in named(tiny_model).items()}
    reports = [load_image_weights(tiny_model, "random"), load_text_weights(tiny_model, "random")]
    assert [report.matched for report in reports] == [0, 0]
    num_outside = sum(
        name.startswith(("image_projection", "text_projection", "itm_head", "temperature"))
        for name in before
    )
    assert sum(len(report.missing) for report in reports) == len(before) - num_outside
    assert_equal(named(tiny_model), before)


@pytest.mark.parametrize("load", [load_image_weights, load_text_weights])
@pytest.mark.parametrize("name", ["./nowhere", "weights.pth", "/nowhere/model.safetensors"])
def test_a_path_that_is_not_there_is_no_hub_name(
    tiny_model: ALBEF, load: Callable, name: str
) -> None:
    refusal(lambda: load(tiny_model, name), name, "no such file or folder")


@pytest.mark.parametrize("load", [load_image_weights, load_text_weights])
def test_a_folder_without_weights_is_refused(
    tmp_path: Path, tiny_model: ALBEF, load: Callable
) -> None:
    refusal(lambda: load(tiny_model, str(tmp_path)), tmp_path, "model.safetensors")


@pytest.mark.parametrize(
    ("load", "name", "flag"),
    [
        (load_image_weights, "deit_tiny_patch16_224", "--image-weights"),
        (load_image_weights, "no_such_model", "--image-weights"),
        (load_text_weights, "nobody/no-such-bert", "--text-weights"),
    ],
)
def test_a_hub_name_that_cannot_be_had_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_model: ALBEF,
    load: Callable,
    name: str,
    flag: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refusal(lambda: load(tiny_model, name), name, flag, "random")
