"""Class-balanced sampling, and the clip that mixup adds to each: pure functions."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from ssast.engine.data.labels import LabelledClips
from ssast.pipelines.clips.order import Weights, clips_at, generator

_PARTNER_KEY = 0x9E3779B97F4A7C15  # keeps these draws apart from crops, which have a similar key


def balanced_weights(clips: LabelledClips) -> Weights:
    """Return sampling weights: the sum over a clip's classes of 1 / (number of their clips).

    As published, up to a constant factor. Clips without a label are drawn as one class more.
    """
    each = 1.0 / np.maximum(clips.counts(), 1)
    labels = np.diff(clips.offsets)
    rows = np.repeat(np.arange(len(clips)), labels)
    weights = np.bincount(rows, each[clips.indices], minlength=len(clips))
    return Weights(np.where(labels > 0, weights, 1.0 / max((labels == 0).sum(), 1)))


def partner_of(clip: int, epoch: int, seed: int, num_clips: int) -> int:
    """Return the row of the clip that mixup adds to a clip in an epoch, uniform over all."""
    return int(generator(seed ^ _PARTNER_KEY, clip, epoch).integers(num_clips))


class Partners(Sequence[Any]):
    """The mixup partner of the clip at each position of the endless training stream.

    Args:
        paths: The training clips.
        total: Number of positions that are used.
        seed: Seed of the stream.
        weights: Sampling weights of the stream.
    """

    def __init__(self, paths: Sequence[Any], total: int, seed: int, weights: Weights | None):
        self._paths, self._total, self._seed, self._weights = paths, total, seed, weights

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, position: int) -> Any: ...

    @overload
    def __getitem__(self, position: slice) -> Sequence[Any]: ...

    def __getitem__(self, position: int | slice) -> Any:
        """Return the clip to add at a position."""
        if isinstance(position, slice):
            return [self[p] for p in range(*position.indices(self._total))]
        if not 0 <= position < self._total:
            raise IndexError(position)
        return self._paths[int(self.rows(np.array([position]))[0])]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows of the clips to add at these positions, [B] int64."""
        count = len(self._paths)
        clips, epochs = clips_at(positions, count, self._seed, self._weights)
        return np.array(
            [
                partner_of(int(c), int(e), self._seed, count)
                for c, e in zip(clips, epochs, strict=True)
            ],
            dtype=np.int64,
        )
