"""The names that the official code gives to weights, and ours: one table, read both ways.

Ours call the two halves of BERT by what they do (`text_encoder`, `multimodal_encoder`); the
official checkpoints count one stack of layers. Pre-training checkpoints and all fine-tuned ones
are covered: retrieval, entailment (`ve`), VQA, NLVR2 and its text assignment.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

IN_A_LAYER = (
    ("self_attention.query", "attention.self.query"),
    ("self_attention.key", "attention.self.key"),
    ("self_attention.value", "attention.self.value"),
    ("self_attention.output", "attention.output.dense"),
    ("self_attention.norm", "attention.output.LayerNorm"),
    ("cross_attention.query", "crossattention.self.query"),
    ("cross_attention.key", "crossattention.self.key"),
    ("cross_attention.value", "crossattention.self.value"),
    ("cross_attention.output", "crossattention.output.dense"),
    ("cross_attention.norm", "crossattention.output.LayerNorm"),
    ("mlp.up", "intermediate.dense"),
    ("mlp.down", "output.dense"),
    ("mlp.norm", "output.LayerNorm"),
)
AROUND_LAYERS = (
    ("word_embeddings", "embeddings.word_embeddings"),
    ("position_embeddings", "embeddings.position_embeddings"),
    ("type_embeddings", "embeddings.token_type_embeddings"),
    ("norm", "embeddings.LayerNorm"),
)
MLM_HEAD = (
    ("transform", "transform.dense"),
    ("norm", "transform.LayerNorm"),
    ("decoder", "decoder"),
)
TOP_LEVEL = (
    ("image_encoder", "visual_encoder"),
    ("image_projection", "vision_proj"),
    ("text_projection", "text_proj"),
    ("itm_head", "itm_head"),
    ("classifier", "cls_head"),
    ("assignment_head", "ta_head"),
)
WITH_TEACHER = re.compile(
    r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)_m\."
)
LAYER = re.compile(r"^encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")
OUR_LAYER = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")


def our_name(official: str, *, text_layers: int) -> str | None:
    """Translate one official key; `text_layers` of the stack belong to the text encoder.

    A teacher's weight gets the prefix `teacher.`. None for `position_ids`, which hold nothing
    learned. Raises KeyError where the official code has no such key.
    """
    if match := WITH_TEACHER.match(official):
        student = official.replace(f"{match[1]}_m.", f"{match[1]}.", 1)
        name = our_name(student, text_layers=text_layers)
        return name and f"teacher.{name}"
    queues = {"temp": "temperature", "image_queue": "queues.image.features"}
    queues |= {"text_queue": "queues.text.features", "queue_ptr": "queues.pointer"}
    queues |= {"idx_queue": "queues.image_ids"}
    if official in queues:
        return queues[official]
    head, _, tail = official.partition(".")
    if head in ("text_encoder", "text_decoder"):
        return _our_bert_name(head, tail.removeprefix("bert."), text_layers)
    for ours, theirs in TOP_LEVEL:
        if head == theirs:
            return f"{ours}.{tail}"
    raise KeyError(official)


def _our_bert_name(head: str, tail: str, text_layers: int) -> str | None:
    is_decoder = head == "text_decoder"
    if tail == "embeddings.position_ids":
        return None
    tail = tail.replace(
        "cls.predictions.bias", "cls.predictions.decoder.bias"
    )  # one bias, two keys
    if match := LAYER.match(tail):
        index, part, kind = int(match[1]), match[2], match[3]
        ours = dict((theirs, ours) for ours, theirs in IN_A_LAYER)[part]
        if is_decoder:
            return f"answer_decoder.layers.{index}.{ours}.{kind}"
        if index < text_layers:
            return f"text_encoder.layers.{index}.{ours}.{kind}"
        return f"multimodal_encoder.layers.{index - text_layers}.{ours}.{kind}"
    part, _, kind = tail.rpartition(".")
    if part.startswith("cls.predictions."):
        ours = dict((theirs, ours) for ours, theirs in MLM_HEAD)[
            part.removeprefix("cls.predictions.")
        ]
        return f"{'answer_head' if is_decoder else 'mlm_head'}.{ours}.{kind}"
    ours = dict((theirs, ours) for ours, theirs in AROUND_LAYERS)[part]
    return f"{'answer_decoder' if is_decoder else 'text_encoder'}.{ours}.{kind}"


def official_name(ours: str, *, text_layers: int, has_mlm_head: bool) -> str:
    """Translate one of our names back; models with an MLM head keep the stack under `bert.`."""
    if ours.startswith("teacher."):
        student = official_name(
            ours.removeprefix("teacher."), text_layers=text_layers, has_mlm_head=has_mlm_head
        )
        head, _, tail = student.partition(".")
        return f"{head}_m.{tail}"
    queues = {"temperature": "temp", "queues.image.features": "image_queue"}
    queues |= {"queues.text.features": "text_queue", "queues.pointer": "queue_ptr"}
    queues |= {"queues.image_ids": "idx_queue"}
    if ours in queues:
        return queues[ours]
    head, _, tail = ours.partition(".")
    bert = "bert." if has_mlm_head else ""
    stacks = {
        "text_encoder": (f"text_encoder.{bert}", 0),
        "multimodal_encoder": (f"text_encoder.{bert}", text_layers),
        "answer_decoder": ("text_decoder.bert.", 0),
    }
    if head in stacks:
        prefix, first = stacks[head]
        if match := OUR_LAYER.match(tail):
            part = dict(IN_A_LAYER)[match[2]]
            return f"{prefix}encoder.layer.{int(match[1]) + first}.{part}.{match[3]}"
        part, _, kind = tail.rpartition(".")
        return f"{prefix}{dict(AROUND_LAYERS)[part]}.{kind}"
    heads = {"mlm_head": "text_encoder", "answer_head": "text_decoder"}
    if head in heads:
        part, _, kind = tail.rpartition(".")
        return f"{heads[head]}.cls.predictions.{dict(MLM_HEAD)[part]}.{kind}"
    return f"{dict(TOP_LEVEL)[head]}.{tail}"


def num_text_layers(official_keys: Iterable[str]) -> int:
    """Count the layers below the first cross-attention: those of the text encoder."""
    layers: dict[int, bool] = {}
    for key in official_keys:
        if match := re.match(
            r"^text_encoder(?:_m)?\.(?:bert\.)?encoder\.layer\.(\d+)\.(crossattention)?", key
        ):
            index = int(match[1])
            layers[index] = layers.get(index, False) or match[2] is not None
    return sum(not looks_at_image for looks_at_image in layers.values())


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the official code, its wrapping in `model` already taken off.

    Queues are turned so that a row is a feature. Raises KeyError with the first key that is
    unknown.
    """
    text_layers = num_text_layers(state)
    ours = {}
    for key, tensor in state.items():
        try:
            name = our_name(key, text_layers=text_layers)
        except KeyError:
            raise KeyError(key) from None  # the whole key, not the part of it that is unknown
        if name is not None:
            ours[name] = tensor.T if name.endswith(".features") else tensor
    return ours


def to_official(
    state: Mapping[str, Tensor], *, text_layers: int, has_mlm_head: bool = True
) -> dict[str, Tensor]:
    """Translate a state dict of ours, with every duplicate and buffer that the official has."""
    official = {}
    for name, tensor in state.items():
        key = official_name(name, text_layers=text_layers, has_mlm_head=has_mlm_head)
        official[key] = tensor.T if name.endswith(".features") else tensor
    for key in list(official):
        if key.endswith("cls.predictions.decoder.bias"):
            official[key.replace("decoder.bias", "bias")] = official[key]
        if key.endswith("embeddings.position_embeddings.weight"):
            positions = torch.arange(len(official[key]))[None]
            official[key.replace("position_embeddings.weight", "position_ids")] = positions
    return official
