"""How often a labelled clip comes up, and which other clip mixup adds to it: pure functions."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from ssast.engine.data.labels import LabelledClips
from ssast.pipelines.clips.order import Weights, clips_at, generator

_PARTNER_KEY = 0x9E3779B97F4A7C15  # keeps these draws apart from crops, which have a similar key


def balanced_weights(clips: LabelledClips) -> Weights:
    """Clips of rare classes more often: the sum over a clip's classes of 1 / (their clips).

    As published, but for a factor.
    """
    each = 1.0 / np.maximum(clips.counts(), 1)
    return Weights(np.add.reduceat(each[clips.indices], clips.offsets[:-1]))


def partner_of(clip: int, epoch: int, seed: int, num_clips: int) -> int:
    """The row of the clip that mixup adds to a clip in an epoch: any one."""
    return int(generator(seed ^ _PARTNER_KEY, clip, epoch).integers(num_clips))


class Partners(Sequence[Any]):
    """The partner of each clip of the endless training stream, place by place.

    Args:
        paths: The manifest.
        total: Places of the stream that are used.
        seed: Of the stream.
        weights: Of the stream.
    """

    def __init__(self, paths: Sequence[Any], total: int, seed: int, weights: Weights | None):
        self._paths, self._total, self._seed, self._weights = paths, total, seed, weights

    def __len__(self) -> int:
        return self._total

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        """The clip to be added at a place."""
        if isinstance(place, slice):
            return [self[p] for p in range(*place.indices(self._total))]
        if not 0 <= place < self._total:
            raise IndexError(place)
        return self._paths[int(self.rows(np.array([place]))[0])]

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Rows of the manifest of the clips to be added at these places, [B] int64."""
        count = len(self._paths)
        clips, epochs = clips_at(places, count, self._seed, self._weights)
        return np.array(
            [
                partner_of(int(c), int(e), self._seed, count)
                for c, e in zip(clips, epochs, strict=True)
            ],
            dtype=np.int64,
        )
