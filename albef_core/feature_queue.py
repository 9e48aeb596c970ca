"""A ring of recent teacher features, each with its image id: negatives beyond the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from albef_core.config import ModelConfig, ObjectiveConfig, Recipe


class FeatureQueue(nn.Module):
    """The latest teacher features of one modality, as in MoCo (ALBEF section 3.2).

    Starts empty: `is_valid` masks unused slots, so that no random vector is ever a negative. Takes
    any batch size; of a batch larger than the ring, the last `num_slots` rows survive. `pointer`
    is the next slot to be written.
    """

    features: Float[Tensor, "Q D"]
    image_ids: Int[Tensor, " Q"]
    is_valid: Tensor
    pointer: Tensor

    def __init__(self, num_slots: int, feature_size: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(num_slots, feature_size))
        self.register_buffer("image_ids", torch.zeros(num_slots, dtype=torch.int64))
        self.register_buffer("is_valid", torch.zeros(num_slots, dtype=torch.bool))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fill_randomly(self, generator: torch.Generator | None = None) -> None:
        """Put a random unit vector of no image into every slot, as the published code does."""
        noise = torch.randn(self.features.shape, generator=generator, dtype=self.features.dtype)
        self.features.copy_(F.normalize(noise, dim=-1))
        self.image_ids.fill_(NO_IMAGE)
        self.is_valid.fill_(True)

    @torch.no_grad()
    def push(self, features: Float[Tensor, "B D"], image_ids: Int[Tensor, " B"]) -> None:
        """Overwrite the oldest slots with this batch."""
        num_slots, num_new = len(self.features), len(features)
        survivors = torch.arange(max(0, num_new - num_slots), num_new, device=features.device)
        slots = (self.pointer + survivors) % num_slots
        self.features[slots] = features[survivors].to(self.features.dtype)
        self.image_ids[slots] = image_ids[survivors]
        self.is_valid[slots] = True
        self.pointer.copy_((self.pointer + num_new) % num_slots)

    def fill_share(self) -> Float[Tensor, ""]:
        """Give the share of slots in use, 0 to 1."""
        return self.is_valid.float().mean()


class Queues(nn.Module):
    """The two rings of teacher features: of images and of texts."""

    def __init__(
        self, model: ModelConfig, objective: ObjectiveConfig, recipe: Recipe, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.image = FeatureQueue(objective.num_slots, model.feature_size)
        self.text = FeatureQueue(objective.num_slots, model.feature_size)
        if not recipe.empty_queue:
            generator = torch.Generator().manual_seed(seed)
            self.image.fill_randomly(generator)
            self.text.fill_randomly(generator)

    def push(
        self,
        image_features: Float[Tensor, "B D"],
        text_features: Float[Tensor, "B D"],
        image_ids: Int[Tensor, " B"],
    ) -> None:
        """Store a batch's teacher features; once a step, after the losses."""
        self.image.push(image_features, image_ids)
        self.text.push(text_features, image_ids)


NO_IMAGE = -1
"""Image id of a slot that holds no photograph; no real one hashes to it."""
