"""Augmentations of filterbanks in fine-tuning, drawn from (seed, epoch, clip) alone.

As published (SSAST, AST), in this order: mixup, SpecAugment, noise, roll. Two differ in form:

- Mixup acts on log-mel power instead of waveforms. Of unrelated sounds a and b, the waveform
  l a + (1 - l) b has on average the power l^2 |a|^2 + (1 - l)^2 |b|^2, which is what is computed.
- Noise is added here before the model's normalisation, so it is scaled by its 2 std.

A clip's numbers depend neither on the batch it is in nor on the rank or the device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssast.kernels.masking import philox

_MIXUP, _SHAPES, _NOISE = 65, 66, 67  # streams of random numbers; see sampling.py
LOG_FLOOR = math.log(torch.finfo(torch.float32).eps)  # of the filterbank


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a batch come from: the seed, and [B] int64 clips and epochs."""

    seed: int
    clips: Tensor
    epochs: Tensor

    def uniform(self, stream: int, count: int) -> Tensor:
        """[B, count] float32 in [0, 1), each clip its own."""
        blocks = torch.arange(-(-count // 4), device=self.clips.device)
        words = philox(self.seed, blocks, self.clips[:, None], self.epochs[:, None], stream)
        return (words.flatten(1)[:, :count] >> 8).float() * 2.0**-24  # 24 bits: never 1


def mixup_shares(draw: Draw, probability: float) -> Tensor:
    """What each clip keeps of itself, [B]: 1, or with this probability a draw from Beta(10, 10).

    The tenth smallest of 19 uniform numbers is distributed so.
    """
    numbers = draw.uniform(_MIXUP, 20)
    share = numbers[:, 1:].kthvalue(10, dim=1).values
    return share.where(numbers[:, 0] < probability, 1.0)


def mix(
    fbank: Tensor, frames: Tensor, other: Tensor, other_frames: Tensor, share: Tensor
) -> Tensor:
    """Filterbanks of mixtures, as long as the first clips.

    Args:
        fbank: [B, T, F] natural log of power, 0 behind the end of a clip.
        frames: [B], where that is.
        other: [B, T, F], what is mixed in; cut, or taken as silent behind its end.
        other_frames: [B].
        share: [B] in [0, 1], amplitude of the first; 1 leaves a clip as it is.
    """
    time = torch.arange(fbank.shape[1], device=fbank.device)[None, :, None]
    share = share[:, None, None]
    silent = torch.full_like(other, -math.inf)
    added = torch.where(time < other_frames[:, None, None], other, silent)
    mixed = torch.logaddexp(fbank + 2 * share.log(), added + 2 * (1 - share).log())
    changed = (time < frames[:, None, None]) & (share < 1)
    return torch.where(changed, mixed.clamp(min=LOG_FLOOR), fbank)


def mix_targets(targets: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Labels [B, C] of mixtures."""
    return share[:, None] * targets + (1 - share[:, None]) * others


def spec_augment(fbank: Tensor, draw: Draw, freq_mask: int, time_mask: int) -> Tensor:
    """Hides one band of mel bins and one run of frames in each clip, [B, T, F].

    A width is drawn from [0, mask), then a place where it fits; what is hidden becomes 0.
    """
    numbers = draw.uniform(_SHAPES, 4)
    hidden = torch.zeros(fbank.shape, dtype=torch.bool, device=fbank.device)
    for axis, widest, at in ((2, freq_mask, 0), (1, time_mask, 2)):
        size = fbank.shape[axis]
        width = numbers[:, at] * widest
        begin = (numbers[:, at + 1] * (size - width)).long()[:, None]
        place = torch.arange(size, device=fbank.device)
        band = (place >= begin) & (place < begin + width.long()[:, None])  # [B, size]
        hidden |= band[:, None, :] if axis == 2 else band[:, :, None]
    return fbank.masked_fill(hidden, 0.0)


def add_noise(fbank: Tensor, draw: Draw, amplitude: float) -> Tensor:
    """Adds U(0, 1) to every value, times an amplitude of the clip from U(0, amplitude)."""
    B, T, F = fbank.shape
    numbers = draw.uniform(_NOISE, T * F + 1)
    return fbank + numbers[:, 1:].view(B, T, F) * (amplitude * numbers[:, :1, None])


def roll(fbank: Tensor, draw: Draw, most: int, frames: Tensor) -> Tensor:
    """Rolls the first ``frames`` [B] of each clip by -most ... most - 1 frames, [B, T, F]."""
    B, T, F = fbank.shape
    shift = (draw.uniform(_SHAPES, 5)[:, 4] * (2 * most)).long() - most
    time = torch.arange(T, device=fbank.device).expand(B, -1)
    length = frames.clamp(min=1)[:, None]
    source = torch.where(time < length, (time - shift[:, None]) % length, time)
    return fbank.gather(1, source[:, :, None].expand(-1, -1, F))
