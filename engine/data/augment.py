"""Augmentations of filterbanks in fine-tuning: pure functions of (seed, epoch, clip).

They follow SSAST and AST, in this order: mixup, SpecAugment, noise, roll. Two differ in form:

- Mixup acts on log-mel power instead of waveforms. For uncorrelated sounds a and b, the waveform
  l a + (1 - l) b has the expected power l^2 |a|^2 + (1 - l)^2 |b|^2, which is what is computed.
  What differs is what depends on their phases: measured in docs/finetuning.md.
- Noise is added before the model's normalisation, so it is scaled by the 2 std of that.

The random numbers of a clip depend neither on its batch nor on the rank or the device.
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
    """Counters of the random numbers of a batch: the seed, and clips and epochs, [B] int64."""

    seed: int
    clips: Tensor
    epochs: Tensor

    def uniform(self, stream: int, count: int) -> Tensor:
        """Draw uniform numbers in [0, 1) for each clip, [B, count] float32."""
        blocks = torch.arange(-(-count // 4), device=self.clips.device)
        words = philox(self.seed, blocks, self.clips[:, None], self.epochs[:, None], stream)
        return (words.flatten(1)[:, :count] >> 8).float() * 2.0**-24  # 24 bits: never 1


def mixup_shares(draw: Draw, probability: float) -> Tensor:
    """Draw the mixup coefficient of each clip, [B]: from Beta(10, 10) with a probability, else 1.

    The tenth smallest of 19 uniform numbers has the distribution Beta(10, 10).
    """
    numbers = draw.uniform(_MIXUP, 20)
    share = numbers[:, 1:].kthvalue(10, dim=1).values
    return share.where(numbers[:, 0] < probability, 1.0)


def mix(
    fbank: Tensor, frames: Tensor, other: Tensor, other_frames: Tensor, share: Tensor
) -> Tensor:
    """Return the filterbanks of mixtures, as long as the first clips.

    Args:
        fbank: Natural log of the power, [B, T, F]; 0 in padding frames.
        frames: Number of valid frames, [B].
        other: Filterbanks to mix in, [B, T, F]; cut, or silent after their valid frames.
        other_frames: Number of their valid frames, [B].
        share: Mixup coefficient, the amplitude of the first clip, [B] in [0, 1]; 1 leaves a clip
            unchanged.
    """
    time = torch.arange(fbank.shape[1], device=fbank.device)[None, :, None]
    share = share[:, None, None]
    silent = torch.full_like(other, -math.inf)
    added = torch.where(time < other_frames[:, None, None], other, silent)
    mixed = torch.logaddexp(fbank + 2 * share.log(), added + 2 * (1 - share).log())
    changed = (time < frames[:, None, None]) & (share < 1)
    return torch.where(changed, mixed.clamp(min=LOG_FLOOR), fbank)


def mix_targets(targets: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return the targets of mixtures, [B, C]."""
    return share[:, None] * targets + (1 - share[:, None]) * others


def spec_augment(
    fbank: Tensor, draw: Draw, freq_mask: float, time_mask: float, frames: Tensor
) -> Tensor:
    """Mask one band of mel bins and one run of the first frames [B] in each clip, [B, T, F].

    A width is drawn from [0, mask), then a start where it fits; masked values become 0. Masks below
    1 are shares of F and of the frames.
    """
    numbers = draw.uniform(_SHAPES, 4)
    masked = torch.zeros(fbank.shape, dtype=torch.bool, device=fbank.device)
    bins = torch.full_like(frames, fbank.shape[2])
    for axis, mask, size, at in ((2, freq_mask, bins, 0), (1, time_mask, frames, 2)):
        widest = mask * size.double() if mask < 1 else size.double().clamp(max=mask)
        width = numbers[:, at] * widest.float()
        begin = (numbers[:, at + 1] * (size - width)).long()[:, None]
        index = torch.arange(fbank.shape[axis], device=fbank.device)
        band = (index >= begin) & (index < begin + width.long()[:, None])  # [B, T] or [B, F]
        masked |= band[:, None, :] if axis == 2 else band[:, :, None]
    return fbank.masked_fill(masked, 0.0)


def add_noise(fbank: Tensor, draw: Draw, amplitude: float) -> Tensor:
    """Add U(0, 1) noise to every value, times an amplitude of each clip from U(0, amplitude)."""
    B, T, F = fbank.shape
    numbers = draw.uniform(_NOISE, T * F + 1)
    return fbank + numbers[:, 1:].view(B, T, F) * (amplitude * numbers[:, :1, None])


def roll(fbank: Tensor, draw: Draw, most: int, frames: Tensor) -> Tensor:
    """Roll the valid frames [B] of each clip by -most ... most - 1 frames, [B, T, F]."""
    B, T, F = fbank.shape
    shift = (draw.uniform(_SHAPES, 5)[:, 4] * (2 * most)).long() - most
    time = torch.arange(T, device=fbank.device).expand(B, -1)
    length = frames.clamp(min=1)[:, None]
    source = torch.where(time < length, (time - shift[:, None]) % length, time)
    return fbank.gather(1, source[:, :, None].expand(-1, -1, F))
