"""The answer decoder of VQA: BERT layers that write a text while they look at a question."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.initialization import initialize_text
from albef_core.text_encoder import (
    SITES_PER_LAYER,
    Attention,
    Mlp,
    TokenEmbeddings,
)


class AnswerDecoder(TokenEmbeddings):
    """Embeddings and as many layers as the multimodal encoder has (ALBEF section 4, VQA)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number=n) for n in range(config.fusion_layers)
        )
        self.apply(partial(initialize_text, width=config.text_width))

    def forward(
        self,
        answer_ids: Int[Tensor, "A T"],
        answer_mask: Bool[Tensor, "A T"],
        question_tokens: Float[Tensor, "A L W"],
        question_mask: Bool[Tensor, "A L"],
        keys: Int[Tensor, " A"] | None = None,
    ) -> Float[Tensor, "A T W"]:
        """Read each answer from left to right beside the question in its row.

        A token sees itself, the tokens before it, and every token of the question: what comes out
        at a place is what the head predicts the next token from. Padding stands at the end of an
        answer. `keys` fix each row's dropout.
        """
        is_past = torch.ones(2 * answer_ids.shape[1:], device=answer_ids.device).tril().bool()
        visible = answer_mask[:, None, None, :] & is_past
        tokens = self.embed(answer_ids, keys)
        for layer in self.layers:
            tokens = layer(tokens, visible, question_tokens, question_mask, keys)
        return tokens


class DecoderLayer(nn.Module):
    """One BERT layer that writes: self-attention to the past, a look at the question, MLP."""

    def __init__(self, config: ModelConfig, *, number: int) -> None:
        super().__init__()
        site, width = 1 + SITES_PER_LAYER * number, config.text_width
        self.self_attention = Attention(config, key_width=width, site=site)
        self.cross_attention = Attention(config, key_width=width, site=site + 2)
        self.mlp = Mlp(config, site=site + 4)

    def forward(
        self,
        tokens: Float[Tensor, "A T W"],
        visible: Bool[Tensor, "A 1 T T"],
        question_tokens: Float[Tensor, "A L W"],
        question_mask: Bool[Tensor, "A L"],
        keys: Int[Tensor, " A"] | None = None,
    ) -> Float[Tensor, "A T W"]:
        """Refine the answer's tokens; `visible` says which tokens each of them may look at."""
        tokens = self.self_attention(tokens, tokens, mask=visible, keys=keys)
        mask = question_mask[:, None, None, :]
        tokens = self.cross_attention(tokens, question_tokens, mask=mask, keys=keys)
        return self.mlp(tokens, keys)
