"""The multimodal encoder of NLVR2: it looks at two images in turn (ALBEF section 4)."""

import re
from collections.abc import Mapping
from functools import partial

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.initialization import initialize_text
from albef_core.text_encoder import TextLayer

FUSION_LAYER = re.compile(r"^multimodal_encoder\.layers\.(\d+)\.(.+)$")


class PairEncoder(nn.Module):
    """Layers in pairs, one pair for each layer of a multimodal encoder.

    The first of a pair looks at the first image, the second at the second. Each has weights of its
    own, but for the key and value projections of the cross-attention, which the two share.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = [
            TextLayer(config, number=config.text_layers + n, attends_to=config.image_width)
            for n in range(2 * config.fusion_layers)
        ]
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            assert first.cross_attention is not None
            assert second.cross_attention is not None
            second.cross_attention.key = first.cross_attention.key
            second.cross_attention.value = first.cross_attention.value
        self.layers = nn.ModuleList(layers)
        self.apply(partial(initialize_text, width=config.text_width))

    def forward(
        self,
        text_tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        first_image: Float[Tensor, "B K I"],
        second_image: Float[Tensor, "B K I"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Fuse each text with the tokens of the two images in its row; [CLS] comes first."""
        for number, layer in enumerate(self.layers):
            looked_at = second_image if number % 2 else first_image
            text_tokens = layer(text_tokens, attention_mask, looked_at, keys=keys)
        return text_tokens


def in_pairs(pretrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give both layers of each pair the weights of one fusion layer of a pre-trained model.

    Takes and gives a state dict by our names; all other weights stay as they are.
    """
    paired = {}
    for name, tensor in pretrained.items():
        if match := FUSION_LAYER.match(name):
            number, part = int(match[1]), match[2]
            paired[f"multimodal_encoder.layers.{2 * number}.{part}"] = tensor
            paired[f"multimodal_encoder.layers.{2 * number + 1}.{part}"] = tensor
        else:
            paired[name] = tensor
    return paired
