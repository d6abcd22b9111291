"""The optimizer and its learning rate: a pure function of the step and of the plateau rule."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ssast.engine.config import Optim


def build_optimizer(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of a module.

    ``adam`` is the published recipe: one group, L2 regularisation in the gradient. ``adamw``
    decays matrices only, neither biases, norms nor learned tokens and positions.
    """
    parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if optim.name == "adam":
        return torch.optim.Adam(
            [p for _, p in parameters],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
    decayed = [p for n, p in parameters if p.ndim > 1 and not n.endswith(("_token", "_embed"))]
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": [p for _, p in parameters if id(p) not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


@dataclass
class Plateau:
    """Lowers the learning rate when a score has stopped rising.

    The rule of torch's ReduceLROnPlateau in mode "max" with its relative threshold of 1e-4.
    """

    best: float = -math.inf
    num_bad: int = 0
    scale: float = 1.0

    def update(self, score: float, optim: Optim) -> None:
        """Take the score of one more validation; the higher the better."""
        if self.best == -math.inf or score > self.best + 1e-4 * abs(self.best):
            self.best, self.num_bad = score, 0
        else:
            self.num_bad += 1
        if self.num_bad > optim.plateau_patience:
            self.scale, self.num_bad = self.scale * optim.plateau_factor, 0


def learning_rate(step: int, optim: Optim, *, steps: int, plateau_scale: float = 1.0) -> float:
    """The learning rate of a step.

    Args:
        step: Steps taken before this one.
        optim: Peak rate, warm-up, schedule.
        steps: Of the whole run; where the cosine ends.
        plateau_scale: What the plateau rule has left of it.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return optim.min_lr + (optim.lr - optim.min_lr) * cosine
    return optim.lr * (plateau_scale if optim.schedule == "plateau" else 1.0)
