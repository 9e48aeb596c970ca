"""What a fine-tuned model says: pictures and texts in, answers or classes with probabilities out.

Axes beside the package's own: C classes, or candidates of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from albef_core.batch import normalize
from albef_core.captions import clean_caption, clean_question
from albef_core.tasks.entailment import EntailmentModel, entail
from albef_core.tasks.folder import LoadedTask
from albef_core.tasks.labels import ENTAILMENT_LABELS, NLVR2_LABELS
from albef_core.tasks.nlvr2 import Nlvr2Model, verify
from albef_core.tasks.text_assignment import LABELS as ASSIGNMENT_LABELS
from albef_core.tasks.text_assignment import AssignmentModel, assign
from albef_core.tasks.vqa import VqaModel
from albef_core.tasks.vqa_answers import generate_answers, rank_answers

MAX_ANSWER_TOKENS = 12
"""Longest answer in tokens, [CLS] and [SEP] included."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of B examples."""

    answers: list[str]
    """The likeliest class or answer of each."""
    probabilities: Float32[np.ndarray, "B C"]
    """Of the classes in the task's order; of a question's candidates, the best first."""
    candidates: list[list[str]]
    """What the columns are, for each example."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How questions are answered."""

    top_k: int = 128
    """Answers of the closed list that are read in full. The published code: 128."""
    is_open: bool = False
    """Write answers freely instead of choosing from the list."""
    num_beams: int = 1
    """Beginnings kept while writing; 1 is greedy."""


def predict(
    loaded: LoadedTask,
    pictures: UInt8[Tensor, "B *P S S 3"],
    texts: Sequence[str],
    *,
    answering: Answering | None = None,
) -> Predictions:
    """Let a fine-tuned model, in eval mode, judge or answer (ALBEF section 4).

    `pictures` are resized to the model's resolution; for NLVR2 and text assignment two a row, left
    and right.
    """
    device = next(loaded.model.parameters()).device
    ids, mask = _tokens(loaded, texts, device)
    pixels = normalize(pictures.to(device).flatten(0, -4)).unflatten(0, pictures.shape[:-3])
    model = loaded.model
    if isinstance(model, VqaModel):
        return _answer(loaded, model, pixels, ids, mask, answering or Answering())
    if isinstance(model, Nlvr2Model):
        true = verify(model, pixels, ids, mask)
        return _classes(torch.stack([1 - true, true], dim=1), NLVR2_LABELS)
    if isinstance(model, AssignmentModel):
        return _classes(assign(model, pixels, ids, mask), ASSIGNMENT_LABELS)
    assert isinstance(model, EntailmentModel)
    return _classes(entail(model, pixels, ids, mask), ENTAILMENT_LABELS)


def _classes(probabilities: Tensor, labels: tuple[str, ...]) -> Predictions:
    best = probabilities.argmax(dim=1).tolist()
    return Predictions(
        answers=[labels[place] for place in best],
        probabilities=probabilities.float().cpu().numpy(),
        candidates=[list(labels) for _ in best],
    )


def _answer(
    loaded: LoadedTask,
    model: VqaModel,
    pixels: Tensor,
    ids: Tensor,
    mask: Tensor,
    answering: Answering,
) -> Predictions:
    tokenizer = loaded.tokenizer
    if answering.is_open:
        written = generate_answers(
            model,
            pixels,
            ids,
            mask,
            cls_id=tokenizer.cls_id,
            sep_id=tokenizer.sep_id,
            vocab_size=tokenizer.vocab_size,
            num_beams=answering.num_beams,
            max_tokens=MAX_ANSWER_TOKENS - 2,
        )
        rows = zip(written.token_ids.cpu(), written.attention_mask.cpu(), strict=True)
        answers = [_join(tokenizer.words(row[is_word])) for row, is_word in rows]
        return Predictions(
            answers=answers,
            probabilities=written.log_likelihoods.exp().float().cpu().numpy()[:, None],
            candidates=[[answer] for answer in answers],
        )
    listed = tokenizer.encode(loaded.answers, max_tokens=MAX_ANSWER_TOKENS, keep_sep=True)
    answer_ids = torch.from_numpy(np.asarray(listed)).to(ids.device).long()
    ranked = rank_answers(
        model,
        pixels,
        ids,
        mask,
        answer_ids,
        answer_ids != tokenizer.pad_id,
        top_k=answering.top_k,
        recipe=loaded.recipe,
    )
    candidates = [[loaded.answers[place] for place in row] for row in ranked.answers.tolist()]
    return Predictions(
        answers=[row[0] for row in candidates],
        probabilities=ranked.probabilities.float().cpu().numpy(),
        candidates=candidates,
    )


def _tokens(
    loaded: LoadedTask, texts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    clean = clean_question if loaded.task == "vqa" else clean_caption
    text = loaded.text_config
    ids = loaded.tokenizer.encode(
        [clean(raw, max_words=text.max_words) for raw in texts],
        max_tokens=text.max_tokens,
        keep_sep=loaded.recipe.keep_sep,
    )
    token_ids = torch.from_numpy(np.asarray(ids)).to(device).long()
    return token_ids, token_ids != loaded.tokenizer.pad_id


def _join(pieces: Sequence[str]) -> str:
    return " ".join(pieces).replace(" ##", "")
