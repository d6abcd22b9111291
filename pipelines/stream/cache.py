"""An in-memory cache of filterbanks: later epochs neither decode nor compute them again."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """A cache of filterbanks, by the clip's row in the manifest."""

    def ready(self, clip_id: int) -> bool:
        """Return whether a clip is cached; then ``get`` must be called for it once. Thread-safe."""
        ...

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Add clips that were not ready: features [B, T, F] and the number of samples of each."""
        ...

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Return filterbanks [B, T, F] on the CPU and the number of samples of each clip."""
        ...


class FbankCache:
    """A cache in memory. Clips that come after it is full are not added.

    One thread may add clips while others call ``ready``.

    Args:
        limit_bytes: Largest size of all filterbanks together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def ready(self, clip_id: int) -> bool:
        """Return whether a clip is cached."""
        return clip_id in self._kept

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Copy new clips to the CPU, while there is room.

        Args:
            clip_ids: B clips.
            features: Filterbanks [B, T, F] on any device.
            lengths: Number of samples of each clip.
        """
        size = features[0].numel() * features.element_size() if len(features) else 0
        for row, (clip_id, length) in enumerate(zip(clip_ids, lengths, strict=True)):
            if clip_id in self._kept or size > self._room:
                continue
            self._room -= size
            self._kept[clip_id] = features[row].detach().to("cpu", copy=True), length

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Return filterbanks [B, T, F] on the CPU and the number of samples of each clip."""
        features, lengths = zip(*(self._kept[clip_id] for clip_id in clip_ids), strict=True)
        return torch.stack(features), list(lengths)
