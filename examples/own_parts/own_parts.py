"""An objective, a backbone and a metric that are not part of ssast-engine; see pyproject.toml."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssast.engine.api import Backbone, Config, Masks, PretrainingModel


class Huber(PretrainingModel):
    """Reconstruction of the masked patches by one linear layer, with the Huber loss."""

    def __init__(self, config: Config):
        super().__init__(config)
        rows, columns = config.model.patch
        self.head = nn.Linear(self.encoder.embed_dim, rows * columns)

    def forward(self, fbank: Tensor, *masks: Masks) -> dict[str, Tensor]:
        """Return the loss of each clip, [B], of filterbanks [B, T, F]."""
        (drawn,) = masks
        states, targets = self.encoder(fbank, drawn, masked_only=True)  # [B, M, D], [B, M, P]
        losses = functional.huber_loss(self.head(states), targets, reduction="none").mean(2)
        if drawn.num_masked is None:
            return {"loss": losses.mean(1)}
        # Clips with padding have fewer masked patches than there are places for.
        counts = drawn.num_masked[:, None]
        masked = torch.arange(losses.shape[1], device=losses.device) < counts
        return {"loss": (losses * masked).sum(1) / counts.clamp(min=1).squeeze(1)}


class ConvolutionBlock(nn.Module):
    """A ConvNeXt block (Liu et al. 2022) on the grid of patches; it sees no padding mask."""

    def __init__(self, width: int, grid: tuple[int, int], num_extra_tokens: int):
        super().__init__()
        self.grid, self.num_extra_tokens = grid, num_extra_tokens
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, padding_mask: Any = None) -> Tensor:
        """Map tokens [B, E + N, D] to tokens; the E extra ones take the mean of the others."""
        patches = tokens[:, self.num_extra_tokens :]
        image = patches.transpose(1, 2).unflatten(2, self.grid)
        mixed = self.depthwise(image).flatten(2).transpose(1, 2)
        mean = mixed.mean(1, keepdim=True).expand(-1, self.num_extra_tokens, -1)
        return tokens + self.mlp(self.norm(torch.cat((mean, mixed), 1)))


class Convolution(Backbone):
    """Convolutions in place of attention."""

    def build_block(self, embed_dim: int, num_heads: int) -> nn.Module:
        """Build one block, as wide as ``model.size`` says."""
        return ConvolutionBlock(embed_dim, self.embed.grid, self.num_extra_tokens)


def recall(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean over the classes of the share of their clips that are found."""
    found, truth = logits.argmax(1), targets.argmax(1)
    return float(np.mean([np.mean(found[truth == c] == c) for c in np.unique(truth)]))
