"""Kaldi log-mel filterbanks from waveforms: the input of the published spectrogram transformers.

For every window of 25 ms, each 10 ms (``snip_edges``: only windows that lie inside the clip):

    x <- x - mean(x)                      (the window's own mean)
    x[k] <- x[k] - 0.97 x[k-1]            (pre-emphasis; x[-1] = x[0])
    x <- x * hann                         (symmetric: its first and last weights are 0)
    p = |rfft(x, n_fft)|^2
    y[m] = log(max(sum_f p[f] mel[f, m], eps))     (natural log, eps of float32)

The triangles of ``mel`` are linear on the mel scale 1127 ln(1 + f / 700), from ``low_hz`` to the
Nyquist frequency. No dither, no energy. Frames after a clip's end are 0.
Source: Kaldi's feature-fbank.cc and mel-computations.cc, as called by the published SSAST code.

On a CPU clips are processed one by one, in buffers that are kept: fresh ones cost page faults.
Pre-emphasis comes first, once for all windows, and then the mean of each window is subtracted as
pre-emphasis would have left it: the same sum in another order. The mel matrix is cut into bands of
neighbouring filters, multiplied with the FFT bins that feed them alone: 7 times fewer operations
than the whole matmul.

On CUDA one kernel takes a block of frames from samples to log-mel, see fbank_kernel.py. Other
devices use :func:`fbank_reference`.
"""

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssast.kernels.mel import EPS, PREEMPHASIS, FbankSpec, mel_matrix, num_frames
from ssast.kernels.operation import custom_op, on_first_call

BLOCK = 1024  # frames at a time on a CPU: fewer cost more in calls and in the mel matmul
BAND = 16  # filters at a time: with 8, 10, 20 or 32, BLAS is slower
PASSED = 1 - float(np.float32(PREEMPHASIS))  # what pre-emphasis in float32 leaves of a constant


def fbank_reference(waveforms: Tensor, num_samples: Tensor, spec: FbankSpec) -> Tensor:
    """Compute :func:`fbank` in plain torch: the reference, and what devices without a kernel use.

    The matmul with the mel matrix is in float64 whatever the input: it is small, and TF32, which a
    training run may have switched on, would cost three digits.

    Args:
        waveforms: [B, S] float32 or float64, on any device.
        num_samples: [B] integer, samples of each clip, at most S are used.
        spec: Filterbank settings.

    Returns:
        [B, T, F] of the dtype of ``waveforms``.
    """
    device, dtype = waveforms.device, waveforms.dtype
    wanted = spec.num_samples
    waves = torch.nn.functional.pad(waveforms, (0, max(0, wanted - waveforms.shape[1])))
    frames = waves[:, :wanted].unfold(1, spec.window, spec.hop)  # [B, T, window]
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    hann = torch.hann_window(spec.window, periodic=False, dtype=torch.float64)
    frames = (frames - PREEMPHASIS * before) * hann.to(device, dtype)
    power = torch.view_as_real(torch.fft.rfft(frames, n=spec.n_fft)).square().sum(-1)
    mel = torch.tensor(mel_matrix(spec), device=device)
    features = (power.double() @ mel).clamp(min=EPS).log().to(dtype)
    sound = num_frames(num_samples.to(device).clamp(max=waveforms.shape[1]), spec)
    past_end = torch.arange(spec.num_frames, device=device) >= sound[:, None]
    return features.masked_fill(past_end[..., None], 0.0)


class _Workspace:
    """Constants and buffers of one thread for one spec."""

    def __init__(self, spec: FbankSpec) -> None:
        block = min(BLOCK, spec.num_frames)
        self.window, self.hop = spec.window, spec.hop
        self.hann = torch.hann_window(spec.window, periodic=False, dtype=torch.float64).float()
        self.signal = torch.zeros(spec.num_samples)
        self.padded = torch.zeros(block, spec.n_fft)  # what follows a window is never written
        self.power = torch.empty(block, spec.n_fft // 2 + 1)
        self.mel = torch.empty(block, spec.n_mels)
        self.bands = []  # (columns of the power, columns of the mel powers, weights)
        mel = mel_matrix(spec)
        for first in range(0, spec.n_mels, BAND):
            last = min(first + BAND, spec.n_mels)
            fed = np.flatnonzero(mel[:, first:last].any(axis=1))
            low, high = (int(fed[0]), int(fed[-1]) + 1) if len(fed) else (0, 1)
            weights = torch.tensor(mel[low:high, first:last]).float()
            self.bands.append((slice(low, high), slice(first, last), weights))

    def run(self, waveform: Tensor, out: Tensor) -> None:
        """Fill ``out`` [n, F] with the frames of ``waveform``, which holds n windows or more."""
        count = out.shape[0]
        used = (count - 1) * self.hop + self.window
        waveform, signal = waveform[:used], self.signal[:used]
        # Each window's first sample gets something from the sample before the window: its weight
        # is 0. The addition is fused, so a large mean does not cost digits before it goes.
        torch.sub(waveform[1:], waveform[:-1], alpha=PREEMPHASIS, out=signal[1:])
        means = waveform.unfold(0, self.window, self.hop).mean(1, keepdim=True).mul_(PASSED)
        frames = signal.unfold(0, self.window, self.hop)
        for start in range(0, count, self.padded.shape[0]):
            stop = min(start + self.padded.shape[0], count)
            padded, power, mel = (x[: stop - start] for x in (self.padded, self.power, self.mel))
            windows = padded[:, : self.window]
            torch.sub(frames[start:stop], means[start:stop], out=windows)
            windows.mul_(self.hann)
            # NumPy's complex abs takes a twelfth of the time of torch's, its log a third (AVX-512).
            np.abs(torch.fft.rfft(padded).numpy(), out=power.numpy())
            power.square_()
            for bins, filters, weights in self.bands:
                torch.mm(power[:, bins], weights, out=mel[:, filters])
            # Not straight into ``out``: the last bits of BLAS depend on how memory is aligned,
            # and a clip must not depend on its place in a batch.
            np.log(mel.clamp_(min=EPS).numpy(), out=out[start:stop].numpy())


class _Workspaces(threading.local):
    """One workspace per thread and spec: pipelines call the op from several threads."""

    def __init__(self) -> None:
        self.by_spec: dict[FbankSpec, _Workspace] = {}

    def get(self, spec: FbankSpec) -> _Workspace:
        if spec not in self.by_spec:
            with torch.inference_mode(False):  # else no later call outside of it could write there
                self.by_spec[spec] = _Workspace(spec)
        return self.by_spec[spec]


_workspaces = _Workspaces()


def fbank_into(out: Tensor, waveform: Tensor, spec: FbankSpec) -> None:
    """Compute the filterbank of one clip on the CPU, into memory that the caller owns.

    Args:
        out: [T, F] float32 on the CPU, contiguous; all of it is written.
        waveform: [S] float32 on the CPU.
        spec: Filterbank settings.
    """
    count = num_frames(waveform.shape[0], spec)
    out[count:] = 0.0
    if count:
        _workspaces.get(spec).run(waveform, out[:count])


def _fbank_torch(
    waveforms: Tensor,
    num_samples: Tensor,
    sample_rate_hz: int,
    n_mels: int,
    frames: int,
    low_hz: float,
) -> Tensor:
    if not len(waveforms):  # torch.fft refuses an empty batch
        return waveforms.new_empty(0, frames, n_mels)
    spec = FbankSpec(sample_rate_hz, n_mels, frames, low_hz)
    return fbank_reference(waveforms, num_samples, spec)


def _fbank_cpu(waveforms: Tensor, num_samples: Tensor, *settings: Any) -> Tensor:
    spec = FbankSpec(*settings)
    out = torch.empty(waveforms.shape[0], spec.num_frames, spec.n_mels)
    for features, waveform, length in zip(out, waveforms, num_samples.tolist(), strict=True):
        fbank_into(features, waveform[:length], spec)
    return out


_on_cuda = on_first_call("fbank_kernel", "fbank_on_cuda")


def _fbank_cuda(waveforms: Tensor, num_samples: Tensor, *settings: Any) -> Tensor:
    return _on_cuda(waveforms, num_samples, FbankSpec(*settings))


def _fbank_fake(
    waveforms: Tensor, num_samples: Tensor, sample_rate_hz: int, n_mels: int, frames: int, *_: Any
) -> Tensor:
    return waveforms.new_empty(waveforms.shape[0], frames, n_mels)


_fbank = custom_op(
    "fbank",
    _fbank_torch,
    cpu=_fbank_cpu,
    cuda=_fbank_cuda,
    fake=_fbank_fake,
    autocast="float32",
)


def fbank(waveforms: Tensor, num_samples: Tensor, spec: FbankSpec) -> Tensor:
    """Compute the log-mel filterbanks of a batch of clips, before normalisation.

    Autocast: float32. Where the waveforms need a gradient, :func:`fbank_reference` is computed.

    Args:
        waveforms: [B, S] float32 in [-1, 1] at ``spec.sample_rate_hz``; a clip's mean, which the
            published code removes first, makes no difference. What lies beyond a clip's end is
            not read.
        num_samples: [B] int64, samples of each clip, on the device of ``waveforms``.
        spec: Filterbank settings.

    Returns:
        [B, T, F] float32, 0 in frames after a clip's end.

    Raises:
        ValueError: Wrong shape, dtype or device.
    """
    if waveforms.ndim != 2 or waveforms.dtype != torch.float32:
        raise ValueError(
            f"waveforms must be [B, S] float32, got {list(waveforms.shape)} {waveforms.dtype}"
        )
    if num_samples.shape != waveforms.shape[:1] or num_samples.dtype != torch.int64:
        raise ValueError(
            f"num_samples must be [{waveforms.shape[0]}] int64, got "
            f"{list(num_samples.shape)} {num_samples.dtype}"
        )
    if num_samples.device != waveforms.device:
        raise ValueError(
            f"num_samples is on {num_samples.device}, waveforms are on {waveforms.device}"
        )
    settings = (spec.sample_rate_hz, spec.n_mels, spec.num_frames, float(spec.low_hz))
    return _fbank(waveforms, num_samples, *settings)
