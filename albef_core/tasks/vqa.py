"""Visual question answering: the model that writes an answer, its start, one fine-tuning step.

Axes beside the package's own: A answers, T answer tokens; B is questions, N the tokens to predict.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.answer_decoder import AnswerDecoder
from albef_core.batch import Share
from albef_core.config import ModelConfig
from albef_core.distributed import world_size
from albef_core.image_encoder import ImageEncoder
from albef_core.keyed import Stream, row_keys
from albef_core.precision import full_precision
from albef_core.pretraining import Place
from albef_core.text_encoder import MlmHead, MultimodalEncoder, TextEncoder
from albef_core.weights import WeightsReport, apply_weights

ANSWERS_PER_QUESTION = 2**16
"""More than any question has: keeps the dropout keys of two questions' answers apart."""
NOT_FOR_VQA = ("teacher.", "queues.", "temperature", "_projection.", "itm_head.")
"""Parts of the names in a pre-training checkpoint that answering a question has no use for."""


class VqaModel(nn.Module):
    """Reads a question beside its image, then writes the answer (ALBEF section 4, VQA).

    Everything is distilled, so the teacher is a `frozen_copy` of one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = MultimodalEncoder(config)
        self.answer_decoder = AnswerDecoder(config)
        self.answer_head = MlmHead(config, self.answer_decoder.word_embeddings)

    def encode_question(
        self,
        images: Float[Tensor, "B 3 R R"],
        question_ids: Int[Tensor, "B L"],
        question_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Fuse each question with its image. `keys` fix each row's dropout."""
        text_tokens = self.text_encoder(question_ids, question_mask, keys)
        image_tokens = self.image_encoder(images)
        return self.multimodal_encoder(text_tokens, question_mask, image_tokens, keys)

    def decode(
        self,
        answer_ids: Int[Tensor, "A T"],
        answer_mask: Bool[Tensor, "A T"],
        question_tokens: Float[Tensor, "A L W"],
        question_mask: Bool[Tensor, "A L"],
        keys: Int[Tensor, " A"] | None = None,
    ) -> Float[Tensor, "A T W"]:
        """Read each answer beside the fused question in its row; `answer_head` scores the next."""
        return self.answer_decoder(answer_ids, answer_mask, question_tokens, question_mask, keys)

    def next_token_logits(
        self,
        answer_ids: Int[Tensor, "A T"],
        answer_mask: Bool[Tensor, "A T"],
        question_tokens: Float[Tensor, "A L W"],
        question_mask: Bool[Tensor, "A L"],
        keys: Int[Tensor, " A"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Score the vocabulary wherever an answer has a next token, row by row.

        `answer_ids[:, 1:][answer_mask[:, 1:]]` are the tokens that come there.
        """
        tokens = self.decode(
            answer_ids[:, :-1], answer_mask[:, :-1], question_tokens, question_mask, keys
        )
        return full_precision(self.answer_head(tokens[answer_mask[:, 1:]]))


def from_pretraining(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of a pre-trained ALBEF the names under which they start a VQA model.

    The decoder starts as the multimodal encoder and the MLM head, its embeddings as those of the
    text encoder; a teacher's weights (`teacher.`) likewise. Other weights keep their names. Where
    images and texts differ in width, keys and values of the decoder's cross-attention, which look
    at a text, have no start among those that look at an image, and are left out.
    """
    started = dict(state)
    for name, tensor in state.items():
        start = name.removeprefix("teacher.")
        prefix = name.removesuffix(start)
        head, _, tail = start.partition(".")
        if head == "mlm_head":
            del started[name]
            started[f"{prefix}answer_head.{tail}"] = tensor
        if head == "text_encoder" and not tail.startswith("layers."):
            started[f"{prefix}answer_decoder.{tail}"] = tensor
        looks = tail.endswith(("cross_attention.key.weight", "cross_attention.value.weight"))
        if head == "multimodal_encoder" and not (looks and tensor.shape[0] != tensor.shape[1]):
            started[f"{prefix}answer_decoder.{tail}"] = tensor
    return started


def start_from_pretraining(
    model: VqaModel, state: Mapping[str, Tensor], *, source: str
) -> WeightsReport:
    """Start a VQA model from the weights of a pre-trained ALBEF, by our names.

    Position embeddings are interpolated to the model's resolution. `source` names the checkpoint in
    the report, and in the InputError of a checkpoint that does not fit.
    """
    started = from_pretraining(state)
    fits = "answer_decoder.layers.0.cross_attention.key.weight" in started
    may_miss = () if fits else ("cross_attention.key.weight", "cross_attention.value.weight")
    return apply_weights(model, started, source=source, may_miss=may_miss, may_add=NOT_FOR_VQA)


@dataclass(frozen=True, kw_only=True)
class VqaBatch(Share):
    """B questions about images, and their A answers in the questions' order."""

    question_ids: Int[Tensor, "B L"]
    """Questions, padded with id 0 where the mask is False."""
    question_mask: Bool[Tensor, "B L"]
    """True on every token that is not padding."""
    answer_ids: Int[Tensor, "A T"]
    """[CLS], the answer, [SEP], then padding."""
    answer_mask: Bool[Tensor, "A T"]
    """True on every token that is not padding."""
    weights: Float[Tensor, " A"]
    """Share of the question's annotators who gave this answer, 0 to 1."""
    num_answers: Int[Tensor, " B"]
    """Answers of each question: the first `num_answers[0]` rows are the first question's."""


@dataclass(frozen=True, kw_only=True)
class VqaStep:
    """The loss of one batch, and what curves and tests want to know of it."""

    loss: Float[Tensor, ""]
    answer_losses: Float[Tensor, " A"]
    """Each answer's own loss, before its weight."""
    logits: Float[Tensor, "N V"]
    """Of every token to predict, answer by answer."""
    teacher_logits: Float[Tensor, "N V"]
    labels: Int[Tensor, " N"]
    """The tokens that were to be predicted."""


def vqa_step(
    student: VqaModel,
    teacher: VqaModel,
    batch: VqaBatch,
    *,
    alpha: float,
    seed: int = 0,
    micro_batch_size: int | None = None,
) -> VqaStep:
    """Teach the decoder to write the annotators' answers (ALBEF sections 3.3 and 4, VQA).

    The loss of an answer is the sum over its tokens; answers add up by their weights, and questions
    are averaged. Moves nothing: before it, the caller lets the teacher follow. With several workers
    `batch` is this worker's share, and the mean of the losses over workers is the loss of the
    global batch.

    Args:
        student: the model that learns.
        teacher: its moving average.
        batch: questions of this worker, each with an answer at least.
        alpha: weight of the teacher's soft targets now.
        seed: of this step's dropout, which depends on it and the question's place alone.
        micro_batch_size: questions, then answers, whose activations are held at once; the gradient
            stays the same.
    """
    place = Place(batch, seed=seed, micro_batch_size=micro_batch_size)
    question = batch.question_ids, batch.question_mask
    question_of = torch.arange(len(batch), device=batch.images.device).repeat_interleave(
        batch.num_answers
    )
    first = batch.num_answers.cumsum(0) - batch.num_answers
    nth = torch.arange(len(question_of), device=question_of.device) - first[question_of]
    rows = place.rows[question_of] * ANSWERS_PER_QUESTION + nth

    def write(model: VqaModel, reading: Stream, writing: Stream) -> Float[Tensor, "N V"]:
        tokens = place.chunks(model.encode_question, batch.images, *question, place.keys(reading))
        return place.chunks(
            model.next_token_logits,
            batch.answer_ids,
            batch.answer_mask,
            tokens[question_of],
            batch.question_mask[question_of],
            row_keys(rows, seed=seed, stream=writing),
        )

    logits = write(student, Stream.TEXT, Stream.ANSWER)
    with torch.no_grad():
        teacher_logits = write(teacher, Stream.TEACHER_TEXT, Stream.TEACHER_ANSWER)
    is_predicted = batch.answer_mask[:, 1:]
    labels = batch.answer_ids[:, 1:][is_predicted]
    losses = answer_losses(logits, teacher_logits, labels, is_predicted, alpha=alpha)
    return VqaStep(
        loss=(batch.weights * losses).sum() / (place.total / world_size()),
        answer_losses=losses,
        logits=logits,
        teacher_logits=teacher_logits,
        labels=labels,
    )


def answer_losses(
    logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    is_predicted: Bool[Tensor, "A S"],
    *,
    alpha: float,
) -> Float[Tensor, " A"]:
    """Sum each answer's cross-entropies with its tokens and, by `alpha`, with the teacher.

    `is_predicted` marks the N tokens to predict in their answers. A long answer weighs more than a
    short one: it is its likelihood that counts.
    """
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = F.cross_entropy(logits, teacher_logits.softmax(dim=1), reduction="none")
    losses = (1 - alpha) * hard + alpha * soft
    return losses.new_zeros(is_predicted.shape).masked_scatter(is_predicted, losses).sum(dim=1)
