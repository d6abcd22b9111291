"""The decoder of latent targets: grouped convolutions over the grid of patches, as in EAT.

    x = x + GELU(LayerNorm(Conv(x)))        3 x 3, 16 groups; LayerNorm over channels, no weights
    prediction = Linear(x)                  of masked patches alone

Chen et al., EAT: Self-Supervised Pre-Training with Efficient Audio Transformer (2024), after
data2vec 2.0 (Baevski et al. 2023).
"""

from torch import Tensor, nn
from torch.nn import functional

from ssast.kernels.patch_embed import take

GROUPS = 16


class DecoderLayer(nn.Module):
    """A grouped convolution, LayerNorm without weights and GELU, with a residual connection."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map [R, rows, columns, D] to the same shape."""
        # Channels last, as the norm needs them: no copy on either side of the convolution.
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + functional.gelu(functional.layer_norm(y, y.shape[3:]))


class Decoder(nn.Module):
    """Convolutional layers over the grid, and a linear layer on the masked patches.

    Args:
        embed_dim: D.
        depth: Number of convolutional layers.
        grid: Rows and columns of patches.
    """

    def __init__(self, embed_dim: int, depth: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList(DecoderLayer(embed_dim) for _ in range(depth))
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, mask_ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predict the latent targets of masked patches.

        Args:
            x: [R, N, D], the student's output at visible patches, noise at masked ones.
            mask_ids: [R, M] int64.
            valid: [R, N] bool, patches that are no padding; all if None. Padding is as what lies
                outside of the grid: zeros before each convolution.

        Returns:
            [R, M, D].
        """
        padding = None if valid is None else ~valid.unflatten(1, self.grid)[..., None]
        x = x.unflatten(1, self.grid)
        for layer in self.layers:
            if padding is not None:
                x = x.masked_fill(padding, 0)
            x = layer(x)
        return self.proj(take(x.flatten(1, 2), mask_ids))
