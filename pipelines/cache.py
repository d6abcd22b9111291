"""Filterbanks kept in memory, so that later epochs need neither decode nor compute them."""

import torch
from torch import Tensor


class FbankCache:
    """Filterbanks of clips, up to a limit; what comes after it is full is not kept.

    One thread adds, others may ask what there is.

    Args:
        limit_bytes: Of all filterbanks together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._kept

    def __len__(self) -> int:
        return len(self._kept)

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
