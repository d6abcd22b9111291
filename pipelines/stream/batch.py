"""The batches that a stream yields."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Kaldi log-mel filterbanks of B clips, with T frames of F mel bins each.

    A clip that could not be read is a row of silence with ``valid`` False: the batch keeps its
    shape, and losses and metrics skip the row.

    Attributes:
        fbank: Natural log of mel power before normalisation, [B, T, F] float32; exactly 0 in
            padding frames.
        num_frames: Valid (unpadded) frames of each clip, [B] int64.
        clip_ids: Row of each clip in the manifest, [B] int64.
        epochs: Epoch of each clip, from 0, [B] int64.
        valid: False for a clip that was replaced by silence, and for those that fill up the last
            batch of a finite pass, [B] bool.
    """

    fbank: Tensor
    num_frames: Tensor
    clip_ids: Tensor
    epochs: Tensor
    valid: Tensor

    def __len__(self) -> int:
        """Return the number of clips, valid or not."""
        return self.fbank.shape[0]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """Move every tensor to a device; return this batch if they are there already.

        Args:
            device: The target device.
            non_blocking: Whether to return before copies from pinned memory are done.
        """
        names = ("fbank", "num_frames", "clip_ids", "epochs", "valid")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        if all(moved[n] is getattr(self, n) for n in names):
            return self
        return replace(self, **moved)
