"""Settings, frames and mel filters of Kaldi's filterbank; see fbank.py."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.channel import Channel

PREEMPHASIS = 0.97
EPS = float(np.finfo(np.float32).eps)  # floor of the mel power, as in Kaldi
WINDOW_MS, HOP_MS = 25, 10

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class FbankSpec:
    """The settings of a filterbank on which a model depends.

    Attributes:
        sample_rate_hz: Rate of the waveforms.
        n_mels: F, mel bins of a frame.
        num_frames: T, frames of a clip: longer clips are cut at the end, shorter ones padded.
        low_hz: Lower edge of the first triangle; the upper edge of the last is the Nyquist
            frequency.
        channel: What a waveform is of a recording with several channels, for what decodes it.

    Raises:
        ValueError: A setting is out of range.
    """

    sample_rate_hz: int = 16000
    n_mels: int = 128
    num_frames: int = 1024
    low_hz: float = 20.0
    channel: Channel = "mean"

    def __post_init__(self) -> None:
        for name, least in (("sample_rate_hz", 1000), ("n_mels", 1), ("num_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, at least {least} is needed")
        if self.channel not in get_args(Channel):
            known = ", ".join(get_args(Channel))
            raise ValueError(f"channel is {self.channel!r}, it must be one of {known}")
        if not 0 <= self.low_hz < self.sample_rate_hz / 2:
            raise ValueError(
                f"low_hz is {self.low_hz}, it must be in [0, {self.sample_rate_hz / 2}), below "
                "the Nyquist frequency"
            )

    @property
    def window(self) -> int:
        """Samples of a frame (25 ms)."""
        return self.sample_rate_hz * WINDOW_MS // 1000

    @property
    def hop(self) -> int:
        """Samples from one frame to the next (10 ms)."""
        return self.sample_rate_hz * HOP_MS // 1000

    @property
    def n_fft(self) -> int:
        """Length of the Fourier transform: the next power of two."""
        return 1 << (self.window - 1).bit_length()

    @property
    def num_samples(self) -> int:
        """Samples that fill all T frames; what follows them in a clip has no effect."""
        return (self.num_frames - 1) * self.hop + self.window


def num_frames(num_samples: Count, spec: FbankSpec) -> Count:
    """Return the valid frames: windows that lie inside the clip, at most ``spec.num_frames``.

    Args:
        num_samples: Length of a clip, or an integer tensor of lengths.
        spec: Filterbank settings.

    Returns:
        The count, an integer or a tensor like ``num_samples``.
    """
    if isinstance(num_samples, Tensor):
        whole = torch.div(num_samples - spec.window, spec.hop, rounding_mode="floor") + 1
        return whole.clamp(0, spec.num_frames)
    return min(max((num_samples - spec.window) // spec.hop + 1, 0), spec.num_frames)


@lru_cache(maxsize=16)
def mel_matrix(spec: FbankSpec) -> np.ndarray:
    """Return the weights of the mel filters.

    Args:
        spec: Filterbank settings.

    Returns:
        [n_fft / 2 + 1, F] float64. The row of the Nyquist frequency is 0, as in Kaldi. A filter
        that is narrower than the spacing of the FFT bins may be all 0.
    """

    def mel(hz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hz / 700.0)

    nyquist = spec.sample_rate_hz / 2
    low, high = mel(np.array([spec.low_hz, nyquist]))
    edges = np.linspace(low, high, spec.n_mels + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.linspace(0.0, nyquist, spec.n_fft // 2 + 1))[:, None]
    weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    weights = np.maximum(weights, 0.0)
    weights[-1] = 0.0
    weights.setflags(write=False)
    return weights
