"""What a pipeline hands to the model: one batch of clips, and the error for bad data."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B clips as Kaldi log-mel filterbanks, with T frames of F mel bins each.

    A clip that could not be read is a row of silence with ``valid`` False: the batch keeps its
    shape, and the row is left out of losses and metrics.

    Attributes:
        fbank: [B, T, F] float32, natural log of mel power before normalisation; exactly 0 in the
            frames after a clip's end.
        num_frames: [B] int64, leading frames that hold sound.
        clip_ids: [B] int64, row of the manifest.
        epochs: [B] int64, the pass over the manifest to which this clip belongs, from 0.
        valid: [B] bool, False for a clip that was replaced by silence and for the clips that
            fill up the last batch of a finite pass.
    """

    fbank: Tensor
    num_frames: Tensor
    clip_ids: Tensor
    epochs: Tensor
    valid: Tensor

    def __len__(self) -> int:
        """Clips in the batch, valid or not."""
        return self.fbank.shape[0]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """The batch with every tensor on ``device`` (the same batch if it is there already).

        Args:
            device: Where the tensors shall be.
            non_blocking: Do not wait for copies out of pinned memory.
        """
        names = ("fbank", "num_frames", "clip_ids", "epochs", "valid")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        if all(moved[n] is getattr(self, n) for n in names):
            return self
        return replace(self, **moved)
