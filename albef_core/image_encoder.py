"""The image encoder: a ViT at any resolution, whose parameters have the names of timm's."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.errors import InputError
from albef_core.initialization import deviation, initialize_image

NORM_EPS = 1e-6


class ImageEncoder(nn.Module):
    """ViT that returns the [CLS] token and every patch (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.image_width
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.image_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.apply(partial(initialize_image, width=width))
        nn.init.trunc_normal_(self.cls_token, std=deviation(width))
        nn.init.trunc_normal_(self.pos_embed, std=deviation(width))

    def forward(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B L W"]:
        """Encode pictures whose side is a multiple of the patch; [CLS] comes first.

        Raises:
            InputError: the side is no multiple of the patch.
        """
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def embed(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B L W"]:
        """Give the tokens that the first block receives.

        Raises:
            InputError: the side is no multiple of the patch.
        """
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + resize_position_embeddings(self.pos_embed, num_patches=patches.shape[1])


class PatchEmbed(nn.Module):
    """Cuts pictures into square patches, row by row, and projects each to a token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(3, config.image_width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B P W"]:
        """Give the tokens of all patches.

        Raises:
            InputError: the side is no multiple of the patch, whose last pixels would be lost.
        """
        side = images.shape[-1]
        if side % self.patch_size:
            raise InputError(
                f"pictures of {side} px cannot be cut into patches of {self.patch_size} px:"
                " give an --image-size that is a multiple."
            )
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """One layer of the ViT: self-attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.image_width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, config.image_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * config.image_mlp_ratio))

    def forward(self, tokens: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Refine the tokens of each picture."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def look(
        self, tokens: Float[Tensor, "B L W"]
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B H L L"]]:
        """Do as `forward`, and tell how each token's attention is shared out.

        The shares of a token and head sum to 1, and gradients can be asked of them.
        """
        context, shares = self.attn.look(self.norm1(tokens))
        tokens = tokens + context
        return tokens + self.mlp(self.norm2(tokens)), shares


class SelfAttention(nn.Module):
    """Multi-head self-attention of all tokens; queries, keys and values are one product."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Let every token look at every other."""
        query, key, value = self._heads(tokens)
        context = F.scaled_dot_product_attention(query, key, value)
        return self.proj(context.transpose(1, 2).flatten(2))

    def look(
        self, tokens: Float[Tensor, "B L W"]
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B H L L"]]:
        """Do as `forward` with the shares spelled out, which the fused kernel keeps to itself."""
        query, key, value = self._heads(tokens)
        shares = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return self.proj((shares @ value).transpose(1, 2).flatten(2)), shares

    def _heads(self, tokens: Float[Tensor, "B L W"]) -> Float[Tensor, "3 B H L S"]:
        """Give queries, keys and values, each by head."""
        heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))
        return heads.permute(2, 0, 3, 1, 4)


class Mlp(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        """Treat every token alone."""
        return self.fc2(F.gelu(self.fc1(tokens)))


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
