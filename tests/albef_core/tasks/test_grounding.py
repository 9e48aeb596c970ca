"""Heat maps agree with the official grounding, and with derivatives by finite differences."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from albef_core.batch import PairBatch
from albef_core.metrics import RIGHT_IOU, box_overlap, box_scores
from albef_core.model import ALBEF
from albef_core.tasks.grounding import (
    Look,
    enlarge,
    itc_looks,
    itc_maps,
    itm_looks,
    itm_maps,
)
from albef_core.weights import apply_weights, read_official
from tests.albef_core.replay import read_json, sizes_of
from tests.golden_folder import GOLDEN, needs_golden

GROUNDING, RETRIEVAL = GOLDEN / "grounding", GOLDEN / "retrieval"
# Over a tensor's largest value; the official code's own two float types differ by 9e-6 of it.
FLOAT32 = 1e-4


def assert_near(found: Tensor, recorded: Tensor, what: str) -> None:
    assert found.shape == recorded.shape, what
    distance = (found - recorded).abs().max() / recorded.abs().max()
    assert distance <= FLOAT32, f"{what}: {distance:.1e}"


def official_model() -> ALBEF:
    config = read_json(RETRIEVAL / "config.json")
    model = ALBEF(sizes_of(config)).eval()
    state = read_official(RETRIEVAL / "checkpoint_init.safetensors")
    apply_weights(model, state, source="golden", may_miss=("mlm_head.",), may_add=("",))
    # PyTorch 1.8.0, which made the recording, embeds padding as zeros whatever its vector is. Only
    # the rows of padding show it, which no other row looks at.
    torch.nn.init.zeros_(model.text_encoder.word_embeddings.weight[0])
    return model


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GROUNDING / "tensors.safetensors")


@needs_golden
def test_every_look_of_the_multimodal_encoder_agrees(recorded: dict[str, Tensor]) -> None:
    blocks = read_json(GROUNDING / "config.json")["itm_blocks"]
    below = read_json(RETRIEVAL / "config.json")["bert_config"]["fusion_layer"]
    mask = recorded["attention_mask"].bool()
    looks, logits = itm_looks(
        official_model(),
        recorded["image"],
        recorded["input_ids"],
        mask,
        layers=[block - below for block in blocks],
    )
    assert_near(logits, recorded["itm_logits"], "logits")
    for block, look in zip(blocks, looks, strict=True):
        prefix = f"itm_block{block}"
        assert_near(look.shares, recorded[f"{prefix}_attention"], f"{prefix} attention")
        assert_near(look.gradient, recorded[f"{prefix}_attention_grad"], f"{prefix} gradient")
        words = look.grad_cam() * mask[:, None, :, None, None]
        assert_near(words, recorded[f"{prefix}_gradcam"], f"{prefix} Grad-CAM")
        assert_near(itm_maps(look, mask), recorded[f"{prefix}_map"], f"{prefix} map")


@needs_golden
def test_every_map_of_a_token_agrees(recorded: dict[str, Tensor]) -> None:
    blocks = read_json(GROUNDING / "config.json")["itm_blocks"]
    below = read_json(RETRIEVAL / "config.json")["bert_config"]["fusion_layer"]
    model, compared = official_model(), 0
    for pair, length in enumerate(recorded["attention_mask"].sum(dim=1).tolist()):
        looks, _ = itm_looks(
            model,
            recorded["image"][[pair]],
            recorded["input_ids"][[pair], :length],
            torch.ones(1, length, dtype=torch.bool),
            layers=[block - below for block in blocks],
        )
        for block, look in zip(blocks, looks, strict=True):
            name = f"notebook_block{block}_pair{pair}_token_maps"
            assert_near(look.token_maps()[0], recorded[name], name)
            compared += 1
    assert compared == sum(name.startswith("notebook_") for name in recorded)


@needs_golden
def test_every_look_of_the_image_encoder_agrees(recorded: dict[str, Tensor]) -> None:
    blocks = read_json(GROUNDING / "config.json")["itc_blocks"]
    looks, similarity = itc_looks(
        official_model(),
        recorded["image"],
        recorded["input_ids"],
        recorded["attention_mask"].bool(),
        layers=blocks,
    )
    assert_near(similarity, recorded["itc_sim"], "similarity")
    for block, look in zip(blocks, looks, strict=True):
        prefix = f"itc_block{block}"
        assert_near(look.shares, recorded[f"{prefix}_attention"], f"{prefix} attention")
        assert_near(look.gradient, recorded[f"{prefix}_attention_grad"], f"{prefix} gradient")
        assert_near(itc_maps(look), recorded[f"{prefix}_map"], f"{prefix} map")


@needs_golden
def test_the_same_boxes_are_chosen(recorded: dict[str, Tensor]) -> None:
    choice = read_json(GROUNDING / "box_choice.json")
    right: dict[str, list[bool]] = {f"{name}_d": [] for name in choice["splits"]}
    rows = zip(
        recorded[choice["map_used"]],
        choice["image_sizes_hw"],
        choice["dets"].values(),
        choice["ref_boxes"],
        choice["splits"],
        choice["chosen"],
        strict=True,
    )
    for heat, (height, width), proposals, truth, split, expected in rows:
        (large,) = enlarge(heat[None], height=height, width=width).numpy()
        boxes = np.array(proposals)
        best = boxes[box_scores(large, boxes, area_power=choice["alpha"]).argmax()]
        overlap = box_overlap(np.array(truth), best[None])[0]
        assert best.tolist() == expected["pred_box"]
        assert truth == expected["ref_box"]
        assert overlap == pytest.approx(expected["iou"], rel=1e-12)
        right[f"{split}_d"].append(bool(overlap >= RIGHT_IOU))
    assert {name: float(np.mean(hits)) for name, hits in right.items()} == choice["accuracy"]


@needs_golden
def test_boxes_overlap_as_recorded() -> None:
    for case in read_json(GROUNDING / "box_choice.json")["computeIoU_cases"]:
        one, other = (np.array(case[name], dtype=float) for name in "ab")
        assert box_overlap(one, other[None])[0] == pytest.approx(case["iou"], rel=1e-12)


def looked(
    model: ALBEF, pairs: PairBatch, *, by: Callable, layers: list[int]
) -> tuple[list[Look], Tensor]:
    return by(model, pairs.images, pairs.token_ids, pairs.attention_mask, layers=layers)


def test_attention_is_shared_out_whole(tiny_model: ALBEF, pairs: PairBatch) -> None:
    for by in (itm_looks, itc_looks):
        (look,), _ = looked(tiny_model.eval(), pairs, by=by, layers=[0])
        torch.testing.assert_close(look.shares.sum(dim=-1), torch.ones(look.shares.shape[:-1]))


def test_looking_changes_neither_the_model_nor_its_answer(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    model = tiny_model.eval()
    _, logits = looked(model, pairs, by=itm_looks, layers=[0])
    _, similarity = looked(model, pairs, by=itc_looks, layers=[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    images, image_features = model.encode_image(pairs.images)
    texts, text_features = model.encode_text(pairs.token_ids, pairs.attention_mask)
    fused = model.fuse(texts, pairs.attention_mask, images)
    torch.testing.assert_close(logits, model.itm_head(fused[:, 0]))
    expected = image_features @ text_features.T / model.temperature
    torch.testing.assert_close(similarity, expected)


def test_frozen_weights_can_be_asked(tiny_model: ALBEF, pairs: PairBatch) -> None:
    (expected,), _ = looked(tiny_model.eval(), pairs, by=itm_looks, layers=[0])
    tiny_model.requires_grad_(False)
    with torch.no_grad():
        (found,), _ = looked(tiny_model, pairs, by=itm_looks, layers=[0])
    assert torch.equal(found.gradient, expected.gradient)


def test_the_gradient_is_what_a_moved_share_does_to_the_match(
    tiny_model: ALBEF, pairs: PairBatch
) -> None:
    model = tiny_model.double().eval()
    images = pairs.images.double()
    (look,), _ = itm_looks(model, images, pairs.token_ids, pairs.attention_mask, layers=[0])
    layer: Any = model.multimodal_encoder.layers[0]
    image_tokens, _ = model.encode_image(images)
    tokens, _ = model.encode_text(pairs.token_ids, pairs.attention_mask)
    mask = pairs.attention_mask[:, None, None, :]
    attention = layer.cross_attention

    def match(shares: Tensor) -> float:
        after = layer.self_attention(tokens, tokens, mask=mask)
        value = attention.value(image_tokens).unflatten(-1, (attention.num_heads, -1))
        context = (shares @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        after = layer.mlp(attention.norm(after + attention.output(context)))
        return model.itm_head(after[:, 0])[:, 1].sum().item()

    step = 1e-5
    for place in ((0, 0, 0, 2), (1, 1, 0, 0), (3, 0, 0, 4), (2, 1, 1, 1)):
        up, down = look.shares.clone(), look.shares.clone()
        up[place] += step
        down[place] -= step
        slope = (match(up) - match(down)) / (2 * step)
        assert look.gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_layers_come_in_the_order_asked_for(
    tiny_config: Any, make_model: Callable[..., ALBEF], pairs: PairBatch
) -> None:
    deep = make_model(type(tiny_config)(**vars(tiny_config) | {"image_layers": 3})).eval()
    several, _ = looked(deep, pairs, by=itc_looks, layers=[2, 0])
    for layer, look in zip([2, 0], several, strict=True):
        (alone,), _ = looked(deep, pairs, by=itc_looks, layers=[layer])
        torch.testing.assert_close(alone.shares, look.shares)
        torch.testing.assert_close(alone.gradient, look.gradient)


def test_a_spelled_out_block_is_the_fused_one(tiny_model: ALBEF, pairs: PairBatch) -> None:
    block: Any = tiny_model.image_encoder.blocks[0]
    tokens = tiny_model.image_encoder.embed(pairs.images)
    found, shares = block.look(tokens)
    torch.testing.assert_close(found, block(tokens))
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(shares.shape[:-1]))


def by_hand() -> Look:
    """One caption of two tokens, two heads, a [CLS] and four patches."""
    shares = torch.arange(1.0, 21).view(1, 2, 2, 5)
    gradient = torch.ones(1, 2, 2, 5)
    gradient[0, 0, 0, 2] = -1
    return Look(shares=shares, gradient=gradient)


def test_maps_leave_out_cls_and_what_speaks_against_the_match() -> None:
    maps = by_hand().grad_cam()
    assert maps[0, 0].tolist() == [[[2, 0], [4, 5]], [[7, 8], [9, 10]]]


def test_heads_are_averaged_or_chosen() -> None:
    look = by_hand()
    assert look.token_maps(head=1)[0, 0].tolist() == [[12, 13], [14, 15]]
    assert look.token_maps()[0, 0].tolist() == [[7, 6.5], [9, 10]]
    assert itc_maps(look)[0].tolist() == [[7, 6.5], [9, 10]]


def test_padding_is_counted_but_adds_nothing() -> None:
    mask = torch.tensor([[True, False]])
    assert itm_maps(by_hand(), mask)[0].tolist() == [[3.5, 3.25], [4.5, 5]]


def test_enlarging_keeps_places_and_shape() -> None:
    heat = torch.zeros(1, 4, 4)
    heat[0, 1, 3] = 1
    large = enlarge(heat, height=40, width=80)[0]
    assert large.shape == (40, 80)
    row, column = divmod(int(large.argmax()), 80)
    assert 10 <= row < 20
    assert 60 <= column < 80
