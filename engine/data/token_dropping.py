"""Token dropping in fine-tuning: which patches are kept, a function of (seed, clip, epoch).

Structured dropping leaves out whole rows (frequency) and columns (time) of the grid, unstructured
dropping a share of what is left (Patchout, Koutini et al. 2022). Every choice is uniform. Of a clip
with padding, its own columns are dropped in proportion: ``floor(number * own / all)`` of them.

The random numbers are those of augmentations (augment.py), from a stream of their own: first one
for each row, then one for each column, then one for each patch; the smallest ones are kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssast.engine.data.augment import Draw
from ssast.engine.finetune_settings import Finetune

_DROPPING = 68  # stream of random numbers; augment.py has those before


class KeptPatches(NamedTuple):
    """The patches of each clip that the encoder sees, in ascending order.

    A tuple, so that it may pass through modules whose hooks (ZeRO-3's) look for tensors.
    """

    ids: Tensor  # [B, K] int64
    num_valid: Tensor | None = None  # [B] int64, how many of them are valid; all if None

    def valid(self) -> Tensor | None:
        """Return which are valid, [B, K] bool; None if all are."""
        if self.num_valid is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.num_valid[:, None]


def _smallest(numbers: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """Return flags of the ``count`` smallest of the numbers in [0, 1) that are ``among``, [B, n].

    Of equal ones the first are taken.
    """
    order = numbers.where(among, 1.0).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return among & (rank < count)


def keep_patches(
    draw: Draw, settings: Finetune, grid: tuple[int, int], valid_columns: Tensor | None = None
) -> KeptPatches:
    """Draw the patches that are kept in training.

    Args:
        draw: Counters of the clips.
        settings: What is dropped.
        grid: Rows and columns of patches.
        valid_columns: [B] int64, columns of patches before the padding; all of them if None.
    """
    (rows, columns), B = grid, len(draw.clips)
    by_row, by_column, by_patch = draw.uniform(_DROPPING, rows + columns + rows * columns).split(
        (rows, columns, rows * columns), 1
    )
    device = draw.clips.device
    own = torch.full((B,), columns, device=device) if valid_columns is None else valid_columns
    kept_columns = _smallest(
        by_column,
        torch.arange(columns, device=device) < own[:, None],
        settings.kept_columns(own, columns)[:, None],
    )
    kept_rows = _smallest(
        by_row, torch.ones_like(by_row, dtype=torch.bool), rows - settings.drop_rows
    )
    among = (kept_rows[:, :, None] & kept_columns[:, None, :]).flatten(1)
    count = settings.kept_patches(rows, own, columns)
    kept = _smallest(by_patch, among, count[:, None])
    ids = kept.logical_not().byte().argsort(dim=1, stable=True)
    ids = ids[:, : settings.kept_patches(rows, columns, columns)]
    return KeptPatches(ids, None if valid_columns is None else count)
