"""ALBEF: three encoders, two projections, two heads, one temperature."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig
from albef_core.image_encoder import ImageEncoder
from albef_core.initialization import PUBLISHED_WIDTH, initialize_text
from albef_core.text_encoder import MlmHead, MultimodalEncoder, Projected, TextEncoder

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


class Encoders(nn.Module):
    """All that student and teacher have in common (ALBEF section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.multimodal_encoder = MultimodalEncoder(config)
        self.image_projection = nn.Linear(config.image_width, config.feature_size)
        self.text_projection = nn.Linear(config.text_width, config.feature_size)
        self.mlm_head = MlmHead(config, self.text_encoder.word_embeddings)

    def drop_mlm_head(self) -> None:
        """Take out the head that names words: retrieval and grounding do not train it.

        Kept, it would read what the encoders no longer write. The published code has none there.
        """
        del self.mlm_head

    def encode_image(
        self, images: Float[Tensor, "B 3 R R"]
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B D"]]:
        """Return every image token, and the [CLS] token as a unit vector in the joint space."""
        tokens = self.image_encoder(images)
        return tokens, unit(self.image_projection(tokens[:, 0]))

    def encode_text(
        self,
        token_ids: Int[Tensor, "B L"],
        attention_mask: Bool[Tensor, "B L"],
        keys: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B D"]]:
        """Return every text token, and the [CLS] token as a unit vector in the joint space.

        `keys` fix each row's dropout (`albef_core.keyed`).
        """
        tokens = self.text_encoder(token_ids, attention_mask, keys)
        return tokens, unit(self.text_projection(tokens[:, 0]))

    def fuse(
        self,
        text_tokens: Float[Tensor, "B L W"],
        attention_mask: Bool[Tensor, "B L"],
        images: Float[Tensor, "B K I"] | Sequence[Projected],
        keys: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L W"]:
        """Let each caption look at the image in its row: at tokens, or at what `project` made."""
        return self.multimodal_encoder(text_tokens, attention_mask, images, keys)

    def project(self, image_tokens: Float[Tensor, "B K I"]) -> list[Projected]:
        """Make the keys and values of every fusion layer, for images that several captions meet."""
        return self.multimodal_encoder.project(image_tokens)


class ALBEF(Encoders):
    """The trained model: the encoders, the matching head, and the temperature of ITC."""

    def __init__(self, config: ModelConfig, *, temperature: float = 0.07) -> None:
        super().__init__(config)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        initialize_text(self.itm_head, width=PUBLISHED_WIDTH)  # at chance, however narrow

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature where the loss is finite and the softmax not flat."""
        self.temperature.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)


def unit(vectors: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Scale each vector to length 1."""
    # In float32 also under autocast: ITC divides the product of two of these by 0.07.
    return F.normalize(vectors.float() if vectors.dtype == torch.bfloat16 else vectors, dim=-1)
