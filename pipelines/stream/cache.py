"""Filterbanks kept in memory, so that later epochs need neither decode nor compute them."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Where filterbanks of clips are kept; the clips are numbered as in the manifest."""

    def ready(self, clip_id: int) -> bool:
        """Whether it has a clip, for which ``get`` will ask once then. From any thread."""
        ...

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Keep clips that were not ready: features [B, T, F], and samples of each."""
        ...

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Filterbanks [B, T, F] on the CPU, and samples of each clip."""
        ...


class FbankCache:
    """Filterbanks of clips, up to a limit; what comes after it is full is not kept.

    One thread adds, others may ask what there is.

    Args:
        limit_bytes: Of all filterbanks together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def ready(self, clip_id: int) -> bool:
        """Whether a clip is kept."""
        return clip_id in self._kept

    def put(self, clip_ids: list[int], features: Tensor, lengths: list[int]) -> None:
        """Keep the clips that are new, while there is room.

        Args:
            clip_ids: B clips.
            features: [B, T, F], on any device; the copies are on the CPU.
            lengths: Samples of each clip.
        """
        size = features[0].numel() * features.element_size() if len(features) else 0
        for row, (clip_id, length) in enumerate(zip(clip_ids, lengths, strict=True)):
            if clip_id in self._kept or size > self._room:
                continue
            self._room -= size
            self._kept[clip_id] = features[row].detach().to("cpu", copy=True), length

    def get(self, clip_ids: list[int]) -> tuple[Tensor, list[int]]:
        """Filterbanks [B, T, F] on the CPU and lengths of clips that are kept."""
        features, lengths = zip(*(self._kept[clip_id] for clip_id in clip_ids), strict=True)
        return torch.stack(features), list(lengths)
