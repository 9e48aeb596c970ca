"""The image encoder: a ViT from timm's blocks, at any resolution."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.initialization import deviation, initialize_image


class ImageEncoder(nn.Module):
    """ViT that returns the [CLS] token and every patch (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.image_width
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(
            config.image_size, config.patch_size, embed_dim=width, strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.image_heads,
                config.image_mlp_ratio,
                qkv_bias=True,
                norm_layer=norm,  # pyright: ignore[reportArgumentType]  # timm calls it as a factory
            )
            for _ in range(config.image_layers)
        )
        self.norm = norm(width)
        self.apply(partial(initialize_image, width=width))
        nn.init.trunc_normal_(self.cls_token, std=deviation(width))
        nn.init.trunc_normal_(self.pos_embed, std=deviation(width))

    def forward(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B L W"]:
        """Encode pictures whose side is a multiple of the patch; [CLS] comes first."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def embed(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B L W"]:
        """Give the tokens that the first block receives."""
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + resize_position_embeddings(self.pos_embed, num_patches=patches.shape[1])


def look(
    block: nn.Module, tokens: Float[Tensor, "B L W"]
) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B H L L"]]:
    """Do as a block of `ImageEncoder` does, and tell how each token's attention is shared out.

    timm's own attention keeps its shares to itself: here it is spelled out from the same weights.
    The shares of a token and head sum to 1, and gradients can be asked of them.
    """
    parts: Any = block  # timm's Block, whose parts a type checker does not know
    attention = parts.attn
    heads = attention.qkv(parts.norm1(tokens)).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    shares = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
    tokens = tokens + attention.proj((shares @ value).transpose(1, 2).flatten(2))
    return tokens + parts.mlp(parts.norm2(tokens)), shares


def resize_position_embeddings(
    embeddings: Float[Tensor, "1 K W"], *, num_patches: int
) -> Float[Tensor, "1 L W"]:
    """Interpolate the patches' position embeddings to another square grid; [CLS]'s stays.

    Bicubic without antialiasing, as the published `interpolate_pos_embed` does.
    """
    old, new = math.isqrt(embeddings.shape[1] - 1), math.isqrt(num_patches)
    if old == new:
        return embeddings
    cls_token, patches = embeddings[:, :1], embeddings[:, 1:]
    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
