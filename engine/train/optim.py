"""The optimizer, and what changes with the step: its learning rate, the decay of averages."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ssast.engine.settings import Optim


def build_optimizer(
    module: nn.Module, optim: Optim, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters of a module.

    ``adam`` is the published recipe: one group, L2 regularisation in the gradient. ``adamw``
    decays matrices only, neither biases, norms nor learned tokens and positions.

    Args:
        module: Module to train.
        optim: Settings of the optimizer.
        lr_scale: Gives the learning rate of a parameter, by its name, as a multiple of the run's.
            Parameters with equal multiples are in one group, which has it as ``lr_scale``.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = optim.name == "adam" or (
            parameter.ndim > 1 and not name.endswith(("_token", "_embed"))
        )
        groups.setdefault((lr_scale(name), decayed), []).append(parameter)
    # Decayed ones first, else in the order in which they come up.
    given = [
        {"params": params, "lr_scale": scale, "weight_decay": optim.weight_decay * decayed}
        for (scale, decayed), params in sorted(groups.items(), key=lambda group: not group[0][1])
    ]
    adam = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
    return adam(given, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


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
        if (self.best == -math.inf and score > self.best) or (
            score > self.best + 1e-4 * abs(self.best)
        ):
            self.best, self.num_bad = score, 0
        else:
            self.num_bad += 1
        if self.num_bad > optim.plateau_patience:
            self.scale, self.num_bad = self.scale * optim.plateau_factor, 0


def warmup_steps(optim: Optim, steps: int) -> int:
    """Return the optimizer steps of the warm-up in a run of so many steps."""
    warmup = optim.warmup_steps
    return round(warmup * steps if warmup < 1 else warmup)


def learning_rate(
    step: int, optim: Optim, *, steps: int, plateau_scale: float = 1.0, steps_per_epoch: int = 1
) -> float:
    """Return the learning rate of a step.

    Args:
        step: Steps taken before this one.
        optim: Peak rate, warm-up and schedule.
        steps: Steps of the whole run; where the cosine ends.
        plateau_scale: Factor of the plateau schedule.
        steps_per_epoch: Steps by which the multistep schedule counts epochs.
    """
    warmup = warmup_steps(optim, steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return optim.min_lr + (optim.lr - optim.min_lr) * cosine
    if optim.schedule == "multistep":
        late = step // steps_per_epoch - optim.decay_start
        return optim.lr * optim.decay_factor ** (late // optim.decay_every + 1 if late >= 0 else 0)
    return optim.lr * (plateau_scale if optim.schedule == "plateau" else 1.0)


def ema_decay(step: int, ema: float) -> float:
    """Return the decay of the weights' moving average at an optimizer step.

    It rises to its value as in TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``:
    otherwise the initial weights stay in the average for the first 1 / (1 - ema) steps and more.

    Args:
        step: Optimizer steps taken before this one.
        ema: The decay, ``train.ema``.
    """
    return min(ema, (1 + step) / (10 + step))
