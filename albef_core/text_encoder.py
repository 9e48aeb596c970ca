"""BERT in two halves: the text encoder, and the multimodal encoder that also looks at the image."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig

NORM_EPS = 1e-12  # BERT's; nothing smaller than it survives float32, which is as published


class TextEncoder(nn.Module):
    """Embeddings and the first layers of BERT, without a look at the image (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.type_embeddings = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))
        self.apply(initialize_bert)

    def forward(
        self, token_ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L W"]:
        """Encode captions; the first token is [CLS]."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        # All captions are segment 0, so BERT's segment embedding is one constant vector.
        tokens = self.word_embeddings(token_ids) + self.position_embeddings(positions)
        tokens = self.dropout(self.norm(tokens + self.type_embeddings.weight[0]))
        for layer in self.layers:
            tokens = layer(tokens, attention_mask)
        return tokens


class MultimodalEncoder(nn.Module):
    """The last layers of BERT, each with cross-attention to the image (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TextLayer(config, attends_to=config.image_width) for _ in range(config.fusion_layers)
        )
        self.apply(initialize_bert)

    def forward(
        self,
        text_tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        image_tokens: Float[Tensor, "B K I"],
    ) -> Float[Tensor, "B L W"]:
        """Fuse each caption with the image in the same row; the first token is [CLS]."""
        for layer in self.layers:
            text_tokens = layer(text_tokens, attention_mask, image_tokens)
        return text_tokens


class TextLayer(nn.Module):
    """One BERT layer: self-attention, cross-attention to an image if it has one, MLP; post-norm."""

    def __init__(self, config: ModelConfig, *, attends_to: int | None = None) -> None:
        super().__init__()
        self.self_attention = Attention(config, key_width=config.text_width)
        self.cross_attention = (
            None if attends_to is None else Attention(config, key_width=attends_to)
        )
        self.mlp = Mlp(config)

    def forward(
        self,
        tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        image_tokens: Float[Tensor, "B K I"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Refine the caption's tokens; padding is never attended to."""
        tokens = self.self_attention(tokens, tokens, mask=attention_mask[:, None, None, :])
        if self.cross_attention is not None:
            assert image_tokens is not None
            tokens = self.cross_attention(tokens, image_tokens)
        return self.mlp(tokens)


class Attention(nn.Module):
    """Multi-head attention with BERT's residual and post-norm; keys may be of another width."""

    def __init__(self, config: ModelConfig, *, key_width: int) -> None:
        super().__init__()
        width = config.text_width
        self.num_heads = config.text_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Float[Tensor, "B L W"],
        attended: Float[Tensor, "B K I"],
        *,
        mask: Bool[Tensor, "B 1 1 K"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Let every token look at `attended`, where the mask is True."""
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.query(tokens), self.key(attended), self.value(attended))
        )
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        context = self.output(context.transpose(1, 2).flatten(2))
        return self.norm(tokens + self.dropout(context))


class Mlp(nn.Module):
    """BERT's feed-forward half layer, with its residual and post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.text_width, config.text_mlp_width)
        self.down = nn.Linear(config.text_mlp_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Refine each token by itself."""
        return self.norm(tokens + self.dropout(self.down(F.gelu(self.up(tokens)))))


class MlmHead(nn.Module):
    """From fused tokens to logits over the vocabulary; the decoder is the word embedding."""

    def __init__(self, config: ModelConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=NORM_EPS)
        self.decoder = nn.Linear(config.text_width, config.vocab_size)
        self.apply(initialize_bert)
        self.decoder.weight = word_embeddings.weight

    def forward(self, tokens: Float[Tensor, "*N W"]) -> Float[Tensor, "*N V"]:
        """Score every word piece at each given token."""
        return self.decoder(self.norm(F.gelu(self.transform(tokens))))


def initialize_bert(module: nn.Module) -> None:
    """Draw weights as BERT does: normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])
