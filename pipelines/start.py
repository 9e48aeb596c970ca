"""What a training starts from: the tokenizer, the first weights."""

import dataclasses
import logging
from pathlib import Path

import torch

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.model import ALBEF
from albef_core.tokenizer import Tokenizer
from albef_core.weights import (
    WeightsReport,
    apply_weights,
    load_image_weights,
    load_model,
    load_text_weights,
    save_model,
)
from pipelines.config import PretrainConfig
from pipelines.manifest import Manifest, read_captions
from pipelines.model_store import find_model

logger = logging.getLogger(__name__)

FREE_SIZES = ("image_size", "dropout", "vocab_size")
"""Sizes that may differ from those of `--init`: positions are interpolated, words are its own."""


def prepare_start(
    config: PretrainConfig, manifest: Manifest, folder: Path
) -> tuple[PretrainConfig, dict[str, str]]:
    """Write the model that training starts from; say which weights it really has.

    Where `folder` holds one already, it is taken as it is: the run goes on.

    Returns:
        The config with the sizes that the model has, and the tags of the run.

    Raises:
        InputError: tokenizer or weights are absent, or do not fit the config.
    """
    if (folder / "config.json").is_file():
        logger.info("%s is there already: this run goes on", folder.parent)
        start = load_model(folder)
        return dataclasses.replace(config, model=start.model_config), {}
    torch.manual_seed(config.seed)
    model, sizes, tokenizer, reports = (
        _from_checkpoint(config) if config.init else _from_encoders(config, manifest)
    )
    _check_vocabulary(sizes.vocab_size, tokenizer, config)
    for side, report in reports.items():
        logger.info("%s from %s", side, report)
    config = dataclasses.replace(config, model=sizes)
    partial = folder.with_name(folder.name + ".tmp")
    save_model(
        partial,
        model,
        model_config=config.model,
        text_config=config.text,
        recipe=config.recipe,
        tokenizer=tokenizer,
    )
    partial.rename(folder)
    return config, {side: str(report) for side, report in reports.items()}


Start = tuple[ALBEF, ModelConfig, Tokenizer, dict[str, WeightsReport]]


def _from_checkpoint(config: PretrainConfig) -> Start:
    start = load_model(find_model("--init", config.init))
    if start.report.missing:
        raise InputError(
            f"--init {config.init}: has no {start.report.missing[0].split('.')[0]}, as"
            " fine-tuned models have none. Start from a pre-training checkpoint."
        )
    asked, given = vars(config.model), vars(start.model_config)
    other = [name for name in given if name not in FREE_SIZES and asked[name] != given[name]]
    if other:
        flags = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in other)
        raise InputError(
            f"--init {config.init}: its model has other sizes than asked for. Take a preset that"
            f" fits, or give {flags}."
        )
    sizes = dataclasses.replace(
        start.model_config, image_size=config.model.image_size, dropout=config.model.dropout
    )
    model = ALBEF(sizes)
    report = apply_weights(model, dict(start.model.named_parameters()), source=config.init)
    return model, sizes, start.tokenizer, {"weights.image": report, "weights.text": report}


def _from_encoders(config: PretrainConfig, manifest: Manifest) -> Start:
    tokenizer = _tokenizer(config, manifest)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    sizes = dataclasses.replace(config.model, vocab_size=vocab_size)
    model = ALBEF(sizes, temperature=config.objective.temperature)
    reports = {
        "weights.image": load_image_weights(model, config.image_weights),
        "weights.text": load_text_weights(model, config.text_weights),
    }
    return model, sizes, tokenizer, reports


def _tokenizer(config: PretrainConfig, manifest: Manifest) -> Tokenizer:
    if config.text.tokenizer != "corpus":
        return Tokenizer.load(config.text.tokenizer)
    captions = (caption for row in read_captions(manifest) for caption in row)
    return Tokenizer.learn(captions, vocab_size=config.text.corpus_vocab_size)


def _check_vocabulary(vocab_size: int, tokenizer: Tokenizer, config: PretrainConfig) -> None:
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is less than the {tokenizer.vocab_size} word pieces of"
            f" --tokenizer {config.text.tokenizer}. Leave it out, or take a larger one."
        )
