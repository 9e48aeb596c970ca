"""Parameter groups of AdamW, and the learning rate at every step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from albef_core.config import OptimConfig

NOT_WEIGHTS = ("temperature", "cls_token", "pos_embed", "position_embeddings", "type_embeddings")


def adamw(model: nn.Module, config: OptimConfig, *, decay_weights_only: bool) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only.

    No decay on biases and norms, as published; with `decay_weights_only` none either on the
    temperature, the class token, and position and segment embeddings.
    """
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        is_plain = parameter.ndim == 1 or name.endswith(".bias")
        if decay_weights_only:
            is_plain = is_plain or any(part in NOT_WEIGHTS for part in name.split("."))
        (plain if is_plain else decayed).append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    # Fused: the fastest of three on CPU and GPU, and without temporaries of a weight's size.
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a function of the step alone: nothing to save, nothing to restore."""

    optim: OptimConfig
    num_steps: int
    """Steps of the whole run."""
    steps_per_epoch: int
    per_step: bool
    """Move every step; else as the published code, by hundreds of steps and by epochs."""

    @property
    def warmup_steps(self) -> int:
        """Give the configured steps of warm-up, else the paper's or the published code's."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return 1000 if self.per_step else 2000

    def lr_at(self, step: int) -> float:
        """Give the learning rate of a step, counted from 0; past the run's end it stays."""
        step = min(step, self.num_steps)
        return self._smooth(step) if self.per_step else self._published(step)

    def _smooth(self, step: int) -> float:
        config = self.optim
        warmup = min(self.warmup_steps, self.num_steps - 1)
        if step < warmup:
            return config.lr * (step + 1) / warmup
        return _cosine(config, step - warmup, of=max(1, self.num_steps - warmup))

    def _published(self, step: int) -> float:
        # The warm-up counter is read in hundreds of iterations, and only inside epoch 0; it moves
        # after iterations 0, 100, 200 ..., so that iterations 0..100 still run at the first value.
        config = self.optim
        hundreds = self.warmup_steps // 100
        epoch, iteration = divmod(step, self.steps_per_epoch)
        if epoch > 0:
            num_epochs = math.ceil(self.num_steps / self.steps_per_epoch)
            return _cosine(config, epoch, of=num_epochs)
        moved = max(0, (iteration - 1) // 100) if iteration else 0
        if moved < hundreds:
            return config.warmup_lr + moved * ((config.lr - config.warmup_lr) / hundreds)
        return config.lr


def _cosine(config: OptimConfig, done: int, *, of: int) -> float:
    # Rounds as the published code does, and so equals it to the last bit.
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * done / of))
