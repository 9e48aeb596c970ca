"""Answering questions: rank the answers of a closed list, or write one freely.

Axes beside the package's own: B questions, A answers of the list, C candidates, T answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from albef_core.config import Recipe
from albef_core.errors import InputError
from albef_core.precision import full_precision
from albef_core.tasks.vqa import VqaModel


def check_answers(answers: Sequence[str], *, source: str) -> None:
    """Refuse a list of closed answers in which a model could not tell two apart.

    Case and runs of white space do not distinguish answers, because the tokenizer drops them.

    Raises:
        InputError: `source`'s list is empty, holds an empty answer, or one answer twice.
    """
    if not answers:
        raise InputError(f"{source}: lists no answer. Give at least one.")
    places: dict[str, int] = {}
    for place, answer in enumerate(answers, start=1):
        words = " ".join(answer.lower().split())
        if not words:
            raise InputError(f"{source}: answer {place} is empty. Take it out.")
        if words in places:
            raise InputError(
                f"{source}: answer {place}, {answer!r}, is answer {places[words]} again."
                " Keep one of them."
            )
        places[words] = place


@dataclass(frozen=True, kw_only=True)
class RankedAnswers:
    """What a model thinks of a closed list: each question's candidates, best first."""

    answers: Int[Tensor, "B C"]
    """Places in the list."""
    log_likelihoods: Float[Tensor, "B C"]
    """Log-probability of the whole answer, [SEP] included."""
    scores: Float[Tensor, "B C"]
    """What they are ranked by."""
    first_token_log_probabilities: Float[Tensor, "B A"]
    """What the candidates were chosen by, for the whole list."""

    @property
    def probabilities(self) -> Float[Tensor, "B C"]:
        """Give the candidates' probabilities, as if there were no other answers."""
        return self.scores.softmax(dim=1)


@torch.inference_mode()
def rank_answers(
    model: VqaModel,
    images: Float[Tensor, "B 3 R R"],
    question_ids: Int[Tensor, "B L"],
    question_mask: Bool[Tensor, "B L"],
    answer_ids: Int[Tensor, "A T"],
    answer_mask: Bool[Tensor, "A T"],
    *,
    top_k: int,
    recipe: Recipe,
    batch_size: int = 256,
) -> RankedAnswers:
    """Rank a list of answers for each question by their likelihood (ALBEF section 4, VQA).

    The `top_k` answers (or all, if fewer) whose first token is the likeliest are read in full. Of
    equals, answers that begin alike, the earlier in the list comes first, at the cut too.

    Args:
        model: in eval mode.
        images: one a question.
        question_ids: padded questions.
        question_mask: False on padding.
        answer_ids: the list: [CLS], the answer, [SEP], padding.
        answer_mask: False on padding.
        top_k: candidates read in full. The published code: 128.
        recipe: says how often the first token counts.
        batch_size: candidates read at once.
    """
    tokens = model.encode_question(images, question_ids, question_mask)
    begin = answer_ids[:1, :1].expand(len(images), 1)
    begun = model.decode(begin, torch.ones_like(begin).bool(), tokens, question_mask)
    first = full_precision(model.answer_head(begun[:, 0])).log_softmax(dim=1)[:, answer_ids[:, 1]]
    order = first.sort(dim=1, descending=True, stable=True).indices
    candidates = order[:, : min(top_k, len(answer_ids))]

    question = torch.arange(len(images), device=images.device)[:, None].expand_as(candidates)
    parts = []
    pairs = torch.stack([question.flatten(), candidates.flatten()], dim=1)
    for row, answer in (batch.unbind(dim=1) for batch in pairs.split(batch_size)):
        mask = answer_mask[answer]
        length = int(mask.sum(dim=1).max())  # candidates end before the longest of the list does
        answers = answer_ids[answer, :length], mask[:, :length]
        parts.append(_log_likelihoods(model, *answers, tokens[row], question_mask[row]))
    log_likelihoods = torch.cat(parts).view_as(candidates)

    scores = log_likelihoods
    if not recipe.count_first_token_once:
        scores = scores + first.gather(1, candidates)
    scores, best_first = scores.sort(dim=1, descending=True, stable=True)
    return RankedAnswers(
        answers=candidates.gather(1, best_first),
        log_likelihoods=log_likelihoods.gather(1, best_first),
        scores=scores,
        first_token_log_probabilities=first,
    )


def _log_likelihoods(
    model: VqaModel,
    answer_ids: Int[Tensor, "P T"],
    answer_mask: Bool[Tensor, "P T"],
    question_tokens: Float[Tensor, "P L W"],
    question_mask: Bool[Tensor, "P L"],
) -> Float[Tensor, " P"]:
    answers = answer_ids, answer_mask
    logits = model.next_token_logits(*answers, question_tokens, question_mask)
    is_predicted = answer_mask[:, 1:]
    labels = answer_ids[:, 1:][is_predicted]
    found = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return found.new_zeros(is_predicted.shape).masked_scatter(is_predicted, found).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswers:
    """One answer a question, in the model's own words."""

    token_ids: Int[Tensor, "B T"]
    """The answers without [CLS] and [SEP], padded with id 0 where the mask is False."""
    attention_mask: Bool[Tensor, "B T"]
    """True on every token that is not padding; an answer may be empty."""
    log_likelihoods: Float[Tensor, " B"]
    """Log-probability of the whole answer, [SEP] included: as `rank_answers` gives it."""


@torch.inference_mode()
def generate_answers(
    model: VqaModel,
    images: Float[Tensor, "B 3 R R"],
    question_ids: Int[Tensor, "B L"],
    question_mask: Bool[Tensor, "B L"],
    *,
    cls_id: int,
    sep_id: int,
    vocab_size: int | None = None,
    num_beams: int = 1,
    max_tokens: int = 10,
) -> GeneratedAnswers:
    """Write an answer to each question, greedily or with beam search; the paper only ranks.

    A beam holds the `num_beams` likeliest beginnings, finished answers among them; one beam is
    greedy. There is no bonus for length: answers compare by their likelihood, as in `rank_answers`.
    After `max_tokens` tokens [SEP] follows, whatever its probability, and that counts. Of equals
    the one from the better beam, then the one with the lower token id comes first.

    Args:
        model: in eval mode.
        images: one a question.
        question_ids: padded questions.
        question_mask: False on padding.
        cls_id: what an answer begins with.
        sep_id: what it ends with.
        vocab_size: word pieces that the tokenizer has, where the model holds spare rows: those are
            never written.
        num_beams: beginnings that are kept for each question.
        max_tokens: longest answer, [CLS] and [SEP] not counted.
    """
    num, device = len(images), images.device
    tokens = model.encode_question(images, question_ids, question_mask)
    tokens = tokens.repeat_interleave(num_beams, dim=0)
    mask = question_mask.repeat_interleave(num_beams, dim=0)
    beams = torch.full((num, num_beams, 1), cls_id, device=device)
    is_done = torch.zeros(num, num_beams, dtype=torch.bool, device=device)
    # All beams of a question begin alike: only one of them may have heirs.
    scores = torch.full((num, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0
    for length in range(max_tokens + 1):
        # Every beginning is read anew: an answer has few tokens, image and question have hundreds.
        begun = beams.flatten(0, 1)
        read = model.decode(begun, torch.ones_like(begun).bool(), tokens, mask)
        logits = full_precision(model.answer_head(read[:, -1]))[:, :vocab_size]
        steps = logits.log_softmax(dim=1).unflatten(0, (num, num_beams))
        is_sep = torch.arange(steps.shape[-1], device=device) == sep_id
        if length == max_tokens:
            steps = steps.masked_fill(~is_sep, -torch.inf)
        # A finished answer stays as it is: one more [SEP], at no cost.
        stays = torch.zeros_like(steps).masked_fill(~is_sep, -torch.inf)
        totals = scores[..., None] + torch.where(is_done[..., None], stays, steps)
        best = totals.flatten(1).sort(dim=1, descending=True, stable=True)
        scores, chosen = best.values[:, :num_beams], best.indices[:, :num_beams]
        parent, token = chosen // steps.shape[-1], chosen % steps.shape[-1]
        beams = beams.gather(1, parent[..., None].expand_as(beams))
        beams = torch.cat([beams, token[..., None]], dim=2)
        is_done = token == sep_id
        # Going on only lowers a score: a finished answer that leads has won.
        if is_done[:, 0].all():
            break
    answers = beams[:, 0, 1:]
    is_word = answers != sep_id
    length = int(is_word.sum(dim=1).max())
    return GeneratedAnswers(
        token_ids=answers.masked_fill(~is_word, 0)[:, :length],
        attention_mask=is_word[:, :length],
        log_likelihoods=scores[:, 0],
    )
