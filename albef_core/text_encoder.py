"""BERT in two halves: the text encoder, and the multimodal encoder that also looks at the image."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.initialization import initialize_text
from albef_core.keyed import KeyedDropout

NORM_EPS = 1e-12  # BERT's; nothing smaller than it survives float32, which is as published
SITES_PER_LAYER = 5
"""Places in a layer where numbers are dropped, each with a mask of its own."""


class TokenEmbeddings(nn.Module):
    """BERT's embeddings: what a stack of layers over token ids begins with."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.text_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.type_embeddings = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = KeyedDropout(config.dropout, site=0)

    def embed(
        self, token_ids: Int[Tensor, "B L"], keys: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L W"]:
        """Look up word and place of every token. `keys` fix each row's dropout."""
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        # All texts are segment 0, so BERT's segment embedding is one constant vector.
        tokens = self.word_embeddings(token_ids) + self.position_embeddings(positions)
        return self.dropout(self.norm(tokens + self.type_embeddings.weight[0]), keys)


class TextEncoder(TokenEmbeddings):
    """Embeddings and the first layers of BERT, without a look at the image (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(TextLayer(config, number=n) for n in range(config.text_layers))
        self.apply(partial(initialize_text, width=config.text_width))

    def forward(
        self,
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Encode captions; the first token is [CLS]. `keys` fix each row's dropout."""
        tokens = self.embed(token_ids, keys)
        for layer in self.layers:
            tokens = layer(tokens, attention_mask, keys=keys)
        return tokens


class Projected(NamedTuple):
    """What an attention looks at, as keys and values of its heads: I images, or texts."""

    key: Float[Tensor, "I H K S"]
    value: Float[Tensor, "I H K S"]

    def rows(self, places: Int[Tensor, " B"]) -> "Projected":
        """Take one of the images for each row; an image may serve many."""
        return Projected(self.key.index_select(0, places), self.value.index_select(0, places))

    @staticmethod
    def joined(parts: Sequence["Projected"]) -> "Projected":
        """Put the images of several after each other."""
        keys, values = zip(*parts, strict=True)
        return Projected(torch.cat(keys), torch.cat(values))


class MultimodalEncoder(nn.Module):
    """The last layers of BERT, each with cross-attention to the image (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TextLayer(config, number=config.text_layers + n, attends_to=config.image_width)
            for n in range(config.fusion_layers)
        )
        self.apply(partial(initialize_text, width=config.text_width))

    def forward(
        self,
        text_tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        images: Float[Tensor, "B K I"] | Sequence[Projected],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Fuse each caption with the image in the same row; the first token is [CLS].

        Images are tokens, or what `project` has made of them.
        """
        for number, layer in enumerate(self.layers):
            looked_at = images if isinstance(images, Tensor) else images[number]
            text_tokens = layer(text_tokens, attention_mask, looked_at, keys=keys)
        return text_tokens

    def project(self, image_tokens: Float[Tensor, "I K W"]) -> list[Projected]:
        """Project images to the keys and values of every layer, once for many captions.

        At full size (577 tokens, float32) that is 21 MB an image. Gradients flow.
        """
        projected = []
        for layer in self.layers:
            assert isinstance(layer, TextLayer)
            assert layer.cross_attention is not None
            key, value = layer.cross_attention.project(image_tokens)
            # A head's keys side by side: they are laid out once here, and read once a row.
            projected.append(Projected(key.contiguous(), value.contiguous()))
        return projected

    def fuse(
        self,
        text_tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        projected: Sequence[Projected],
        image_of_row: Int[Tensor, " B"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Do as `forward`, with images that `project` has seen; `image_of_row` counts among them.

        Where an image meets many captions, copying its keys and values to each row is cheaper than
        projecting it once a row.
        """
        for layer, images in zip(self.layers, projected, strict=True):
            looked_at = images.rows(image_of_row)
            text_tokens = layer(text_tokens, attention_mask, looked_at, keys=keys)
        return text_tokens


class TextLayer(nn.Module):
    """One BERT layer: self-attention, cross-attention to an image if it has one, MLP; post-norm."""

    def __init__(self, config: ModelConfig, *, number: int, attends_to: int | None = None) -> None:
        super().__init__()
        site = 1 + SITES_PER_LAYER * number
        self.self_attention = Attention(config, key_width=config.text_width, site=site)
        self.cross_attention = (
            None if attends_to is None else Attention(config, key_width=attends_to, site=site + 2)
        )
        self.mlp = Mlp(config, site=site + 4)

    def forward(
        self,
        tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        images: Float[Tensor, "B K I"] | Projected | None = None,
        *,
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Refine the caption's tokens; padding is never attended to. Images may be projected."""
        mask = attention_mask[:, None, None, :]
        tokens = self.self_attention(tokens, tokens, mask=mask, keys=keys)
        if self.cross_attention is not None:
            assert images is not None
            tokens = self.cross_attention(tokens, images, keys=keys)
        return self.mlp(tokens, keys)

    def look(
        self,
        tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        image_tokens: Float[Tensor, "B K I"],
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B H L K"]]:
        """Do as `forward` in eval mode, and tell how each token's attention to the image is shared.

        The shares of a token and head sum to 1, and gradients can be asked of them.
        """
        assert self.cross_attention is not None
        tokens = self.self_attention(tokens, tokens, mask=attention_mask[:, None, None, :])
        tokens, shares = self.cross_attention.look(tokens, image_tokens)
        return self.mlp(tokens), shares


class Attention(nn.Module):
    """Multi-head attention with BERT's residual and post-norm; keys may be of another width."""

    def __init__(self, config: ModelConfig, *, key_width: int, site: int) -> None:
        super().__init__()
        width = config.text_width
        self.num_heads = config.text_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.share_dropout = KeyedDropout(config.dropout, site=site)
        self.dropout = KeyedDropout(config.dropout, site=site + 1)

    def forward(
        self,
        tokens: Float[Tensor, "B L W"],
        attended: Float[Tensor, "B K I"] | Projected,
        *,
        mask: Bool[Tensor, "B 1 #L K"] | None = None,
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Let every token look at `attended`, tokens or what `project` made of them.

        Where the mask is False it does not look.
        """
        query = self._heads(self.query(tokens))
        key, value = attended if isinstance(attended, Projected) else self.project(attended)
        if self.share_dropout.is_active:
            # Spelled out, because the fused kernel draws its own masks. Captions are short.
            shares = self.share_dropout(_shares(query, key, mask), keys)
            context = shares.to(value.dtype) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, mask)
        return self._add(tokens, context, keys)

    def look(
        self, tokens: Float[Tensor, "B L W"], attended: Float[Tensor, "B K I"]
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B H L K"]]:
        """Do as `forward` in eval mode, and tell how each token's attention is shared out."""
        query, (key, value) = self._heads(self.query(tokens)), self.project(attended)
        shares = _shares(query, key)
        return self._add(tokens, shares @ value), shares

    def project(self, attended: Float[Tensor, "B K I"]) -> Projected:
        """Make the keys and values that tokens look at."""
        return Projected(self._heads(self.key(attended)), self._heads(self.value(attended)))

    def _heads(self, projected: Float[Tensor, "B L W"]) -> Float[Tensor, "B H L S"]:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _add(
        self,
        tokens: Float[Tensor, "B L W"],
        context: Float[Tensor, "B H L S"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        context = self.output(context.transpose(1, 2).flatten(2))
        return self.norm(tokens + self.dropout(context, keys))


def _shares(
    query: Float[Tensor, "B H L S"],
    key: Float[Tensor, "B H K S"],
    mask: Bool[Tensor, "B 1 #L K"] | None = None,
) -> Float[Tensor, "B H L K"]:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


class Mlp(nn.Module):
    """BERT's feed-forward half layer, with its residual and post-norm."""

    def __init__(self, config: ModelConfig, *, site: int) -> None:
        super().__init__()
        self.up = nn.Linear(config.text_width, config.text_mlp_width)
        self.down = nn.Linear(config.text_mlp_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=NORM_EPS)
        self.dropout = KeyedDropout(config.dropout, site=site)

    def forward(
        self, tokens: Float[Tensor, "B L W"], keys: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L W"]:
        """Refine each token by itself."""
        return self.norm(tokens + self.dropout(self.down(F.gelu(self.up(tokens))), keys))


class MlmHead(nn.Module):
    """From fused tokens to logits over the vocabulary; the decoder is the word embedding."""

    def __init__(self, config: ModelConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, eps=NORM_EPS)
        self.decoder = nn.Linear(config.text_width, config.vocab_size)
        self.apply(partial(initialize_text, width=config.text_width))
        self.decoder.weight = word_embeddings.weight

    def forward(self, tokens: Float[Tensor, "*N W"]) -> Float[Tensor, "*N V"]:
        """Score every word piece at each given token."""
        return self.decoder(self.norm(F.gelu(self.transform(tokens))))
