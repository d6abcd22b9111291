"""Waveforms in memory to filterbanks, window by window."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ssast.kernels.fbank import FbankSpec, fbank, num_frames


def fbank_windows(
    waves: Tensor, lengths: Tensor, spec: FbankSpec, hop: int, end: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the filterbanks of windows of waveforms, each as long as the input of a model.

    Args:
        waves: [B, S] float32 in [-1, 1], zero-padded.
        lengths: [B] int64, valid samples of each waveform.
        spec: Filterbank settings.
        hop: Samples from one window to the next.
        end: Sample before which the last window begins.

    Yields:
        Filterbanks [B, T, F] of a window, and the number of its valid frames [B].
    """
    centred = waves - waves.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]
    inside = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
    centred = centred.where(inside, 0)
    for start in range(0, end, hop):
        part = centred[:, start : start + spec.num_samples].contiguous()
        samples = (lengths - start).clamp(0, part.shape[1])
        yield fbank(part, samples, spec), num_frames(samples, spec)
