"""Patch embedding of SSAST: tokens of patches with their positions, after extra tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssast.engine.settings import EXTRA_TOKENS, Audio, Model
from ssast.kernels.masking import Masks
from ssast.kernels.patch_embed import patch_embed, patch_grid
from ssast.kernels.scatter_tokens import visible_token_ids


class SharedTokens(NamedTuple):
    """Tokens that all clips share: before the first block, a masked patch is its position alone."""

    tokens: Tensor  # [N, D], mask embedding plus position embedding of each patch
    masks: Masks
    num_extra_tokens: int

    @property
    def saves_work(self) -> bool:
        """Whether the batch has more masked patches than there are shared tokens."""
        return self.masks.mask_ids.numel() > len(self.tokens)

    def visible_token_ids(self) -> Tensor:
        """Return the positions of the extra tokens and the visible patches, [B, E + V]."""
        return visible_token_ids(self.masks, self.num_extra_tokens)


class PatchEmbed(nn.Module):
    """Patch embedding: filterbanks [B, T, F] to tokens [B, E + N, D] and targets [B, M, P].

    Attributes:
        num_extra_tokens: E, the tokens before the patches: cls and dist, or cls alone.
        pos_embed: Position embedding [1, E + N, D]: a parameter where it is learned, else a buffer
            that is in no state dict.
    """

    pos_embed: Tensor

    def __init__(self, model: Model, stride: tuple[int, int], embed_dim: int, audio: Audio):
        super().__init__()
        self.patch, self.stride, self.mean, self.std = model.patch, stride, audio.mean, audio.std
        self.ignore_padding = audio.ignore_padding
        self.grid = patch_grid(audio.n_mels, audio.num_frames, self.patch, stride)
        self.num_extra_tokens = EXTRA_TOKENS[model.extra_tokens]
        projection = nn.Conv2d(1, embed_dim, self.patch)  # for its initialisation and shape
        self.weight, self.bias = projection.weight, projection.bias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = None
        if model.extra_tokens == "cls_dist":
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if model.positions == "learned":
            num_tokens = self.num_extra_tokens + self.grid[0] * self.grid[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        else:
            positions = sincos_positions(self.grid, embed_dim, self.num_extra_tokens)
            self.register_buffer("pos_embed", positions.to(self.weight.dtype), persistent=False)
            nn.init.xavier_uniform_(self.weight.flatten(1))  # as where this came from
        for learned in (self.cls_token, self.dist_token, self.pos_embed):
            if isinstance(learned, nn.Parameter):
                nn.init.trunc_normal_(learned, std=0.02)
        if model.norm == "post":  # beside the LayerNorm before the first block, no small numbers
            for token in (self.cls_token, self.dist_token):
                if token is not None:
                    nn.init.normal_(token)
        if not self.mask_embed.is_meta:  # where this draw would import torch's compiler: a second
            nn.init.xavier_normal_(self.mask_embed)

    def extra_tokens(self) -> Tensor:
        """Return the tokens before the patches, without positions, [1, E, D]."""
        if self.dist_token is None:
            return self.cls_token
        return torch.cat((self.cls_token, self.dist_token), 1)

    def valid_columns(self, num_frames: Tensor | None) -> Tensor | None:
        """Count the columns of patches that lie whole in the sound, [B], at least one.

        None where padding counts as sound, or where no length is given.
        """
        if num_frames is None or not self.ignore_padding:
            return None
        whole = torch.div(num_frames - self.patch[1], self.stride[1], rounding_mode="floor") + 1
        return whole.clamp(1, self.grid[1])

    def normalise(self, fbank: Tensor) -> Tensor:
        """Normalise filterbanks [B, T, F]; patches are cut from the result."""
        return (fbank - self.mean) / (2 * self.std)

    def forward(self, fbank: Tensor, masks: Masks) -> tuple[Tensor, Tensor, SharedTokens]:
        """Return tokens and targets (see :func:`patch_embed`), and the shared tokens.

        Raises:
            ValueError: The filterbanks have other patches than the model.
        """
        if fbank.ndim != 3 or self.grid != patch_grid(
            fbank.shape[2], fbank.shape[1], self.patch, self.stride
        ):
            rows, columns = self.grid
            raise ValueError(
                f"expected filterbanks [B, T, F] of {rows} x {columns} patches of {self.patch[0]} "
                f"mel bins x {self.patch[1]} frames, got {list(fbank.shape)}"
            )
        assert self.bias is not None
        pos_embed = self.pos_embed.to(self.weight.dtype)  # fixed positions stay float32
        tokens, targets = patch_embed(
            fbank,
            self.weight,
            self.bias,
            self.mask_embed.flatten(),
            pos_embed,
            self.extra_tokens(),
            masks,
            mean=self.mean,
            std=self.std,
            stride=self.stride,
        )
        masked = (self.mask_embed + pos_embed[:, self.num_extra_tokens :]).squeeze(0)
        return tokens, targets, SharedTokens(masked, masks, self.num_extra_tokens)


def sincos_positions(grid: tuple[int, int], embed_dim: int, num_extra_tokens: int) -> Tensor:
    """Return fixed two-dimensional sine-cosine positions of the patches of a grid.

        p(x)[i], p(x)[D/4 + i] = sin(x w_i), cos(x w_i),   w_i = 10000^(-i / (D/4)),  0 <= i < D/4
        position of (row, column) = [p(row), p(column)]

    As in MAE (He et al. 2022) and EAT (Chen et al. 2024) with the frequency first; one axis has the
    formula of Vaswani et al. (2017). The extra tokens have no position: zeros.

    Args:
        grid: Rows (frequency) and columns (time) of the patches.
        embed_dim: D, a multiple of 4.
        num_extra_tokens: E.

    Returns:
        [1, E + N, D] float64.
    """
    quarter = embed_dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    halves = []
    for length in grid:
        angles = torch.outer(torch.arange(length, dtype=torch.float64), omega)
        halves.append(torch.cat((angles.sin(), angles.cos()), 1))  # [length, D / 2]
    rows, columns = grid
    row = halves[0][:, None].expand(-1, columns, -1)
    column = halves[1].expand(rows, -1, -1)
    patches = torch.cat((row, column), 2).flatten(0, 1)
    return nn.functional.pad(patches, (0, 0, num_extra_tokens, 0))[None]


def resize_pos_embed(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], num_extra_tokens: int
) -> Tensor:
    """Adapt the position embedding to another patch grid, as the published fine-tuning does.

    An axis is cropped around its centre where the new grid is shorter and interpolated (bilinear)
    where it is longer; the extra tokens keep their embeddings.

    Args:
        pos_embed: Learned position embedding [1, E + N, D].
        old: Rows and columns of its grid.
        new: Rows and columns of the new grid.
        num_extra_tokens: E.

    Returns:
        [1, E + N', D].
    """
    extra, image = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    image = image.transpose(1, 2).unflatten(2, old)  # [1, D, rows, columns]
    for axis in (3, 2):  # time first, as published
        length, found = new[axis - 2], image.shape[axis]
        if length < found:
            image = image.narrow(axis, found // 2 - length // 2, length)
        elif length > found:
            size = (image.shape[2], length) if axis == 3 else (length, image.shape[3])
            image = nn.functional.interpolate(
                image, size=size, mode="bilinear", align_corners=False
            )
    return torch.cat((extra, image.flatten(2).transpose(1, 2)), 1)
