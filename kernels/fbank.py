"""Kaldi log-mel filterbanks from waveforms: what the published spectrogram transformers were fed.

For every window of 25 ms, each 10 ms (``snip_edges``: only windows that lie inside the clip):

    x <- x - mean(x)                      (the window's own mean)
    x[k] <- x[k] - 0.97 x[k-1]            (pre-emphasis; x[-1] = x[0])
    x <- x * hann                         (symmetric: its first and last weights are 0)
    p = |rfft(x, n_fft)|^2
    y[m] = log(max(sum_f p[f] mel[f, m], eps))     (natural log, eps of float32)

The triangles of ``mel`` are linear on the mel scale 1127 ln(1 + f / 700), from ``low_hz`` to the
Nyquist frequency. No dither, no energy. Frames after a clip's end are 0.
Source: Kaldi's feature-fbank.cc and mel-computations.cc, as called by the published SSAST code.

On a CPU one clip is worked through in two blocks of frames, every intermediate in a buffer that
is kept: no allocation, no page faults. The mel matrix is cut into bands of neighbouring filters,
whose product runs over the bins that feed them alone: 4 times fewer multiplications than the whole
product.

On CUDA one kernel takes a block of frames of a clip from samples to log-mel. The power does not
change when a frame is moved in time, so the frame is centred on 0. Of a frame x after the
pre-emphasis, with W its length and H = W // 2, the sums and differences of samples at the same
distance from the centre,

    even[m] = x[H + m] + x[W - 1 - H - m]        odd[m] = x[H + m] - x[W - 1 - H - m]

are all that the real and the imaginary part of the transform see (the hann window is symmetric,
and leaves nothing of samples 0 and W - 1):

    real[f] = sum_m even[m] hann[H + m] cos(2 pi f (H + m - (W - 1) / 2) / n_fft)
    imaginary[f] = sum_m odd[m] hann[H + m] sin(2 pi f (H + m - (W - 1) / 2) / n_fft)

for 0 <= m < (W - 1) // 2; of an odd W the middle sample, which meets itself, counts half. These
are two matrix products of half the plain DFT's size, on tensor cores with three TF32 products for
one of float32; so is the one with ``mel``. A program makes up to 64 filters from the bins that feed
them alone. On other devices, and in float64, the batch goes through :func:`fbank_reference`.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture

PREEMPHASIS = 0.97
EPS = float(np.finfo(np.float32).eps)  # floor of the mel power, as in Kaldi
WINDOW_MS, HOP_MS = 25, 10
BLOCK = 512  # frames at a time on a CPU: fewer cost more in calls, more bring nothing
NUM_BANDS = 4
TABLE_COLUMNS = 32  # the tables of the CUDA kernel have a multiple of so many

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

    Raises:
        ValueError: For a setting out of range.
    """

    sample_rate_hz: int = 16000
    n_mels: int = 128
    num_frames: int = 1024
    low_hz: float = 20.0

    def __post_init__(self) -> None:
        for name, least in (("sample_rate_hz", 1000), ("n_mels", 1), ("num_frames", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, at least {least} is needed")
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
    """Frames that hold sound: the windows that lie inside the clip, at most ``spec.num_frames``.

    Args:
        num_samples: Length of a clip, or an integer tensor of lengths.
        spec: Filterbank settings.

    Returns:
        The count, of the argument's kind.
    """
    if isinstance(num_samples, Tensor):
        whole = torch.div(num_samples - spec.window, spec.hop, rounding_mode="floor") + 1
        return whole.clamp(0, spec.num_frames)
    return min(max((num_samples - spec.window) // spec.hop + 1, 0), spec.num_frames)


@lru_cache(maxsize=16)
def mel_matrix(spec: FbankSpec) -> np.ndarray:
    """Weights of the mel filters.

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


def fbank_reference(waveforms: Tensor, num_samples: Tensor, spec: FbankSpec) -> Tensor:
    """The definition of :func:`fbank` in plain torch; also its implementation where no kernel is.

    The product with the mel matrix is in float64 whatever the input: it is small, and TF32, which
    a training run may have switched on, would cost three digits.

    Args:
        waveforms: [B, S] float32 or float64, on any device.
        num_samples: [B] integer, samples of each clip; more than S count as S.
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
        num_bins = spec.n_fft // 2 + 1
        self.hop = spec.hop
        self.hann = torch.hann_window(spec.window, periodic=False, dtype=torch.float64).float()
        self.centred = torch.empty(block, spec.window)
        self.padded = torch.zeros(block, spec.n_fft)  # column 0 and the tail are never written
        self.spectrum = torch.empty(block, num_bins, dtype=torch.complex64)
        self.squares = torch.view_as_real(self.spectrum).view(block, 2 * num_bins)
        self.mel = torch.empty(block, spec.n_mels)
        self.bands = []  # (columns of the squares, columns of the mel powers, weights)
        mel = mel_matrix(spec)
        for filters in np.array_split(np.arange(spec.n_mels), min(NUM_BANDS, spec.n_mels)):
            first, last = int(filters[0]), int(filters[-1]) + 1
            fed = np.flatnonzero(mel[:, first:last].any(axis=1))
            low, high = (int(fed[0]), int(fed[-1]) + 1) if len(fed) else (0, 1)
            # Every row twice: the product adds the squares of real and imaginary parts as well.
            weights = torch.tensor(mel[low:high, first:last].repeat(2, axis=0)).float()
            self.bands.append((slice(2 * low, 2 * high), slice(first, last), weights))

    def run(self, waveform: Tensor, out: Tensor) -> None:
        """Fill ``out`` [n, F] with the frames of ``waveform``, which holds n windows or more."""
        count = out.shape[0]
        frames = waveform.unfold(0, self.hann.shape[0], self.hop)[:count]
        means = frames.mean(1, keepdim=True)
        for start in range(0, count, self.centred.shape[0]):
            size = min(self.centred.shape[0], count - start)
            stop = start + size
            centred, padded, squares = self.centred[:size], self.padded[:size], self.squares[:size]
            torch.sub(frames[start:stop], means[start:stop], out=centred)
            emphasised = padded[:, 1 : centred.shape[1]]  # the window's first weight is 0
            torch.sub(centred[:, 1:], centred[:, :-1], alpha=PREEMPHASIS, out=emphasised)
            emphasised.mul_(self.hann[1:])
            torch.fft.rfft(padded, out=self.spectrum[:size])
            squares.square_()
            # Not straight into ``out``: the last bits of BLAS depend on how memory is aligned,
            # and a clip must not depend on its place in a batch.
            mel = self.mel[:size]
            for bins, filters, weights in self.bands:
                torch.mm(squares[:, bins], weights, out=mel[:, filters])
            out[start:stop] = mel.clamp_(min=EPS).log_()


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
    """The CPU kernel for one clip, into memory that the caller owns.

    Args:
        out: [T, F] float32 on the CPU, contiguous; all of it is written.
        waveform: [S] float32 on the CPU, the mean removed.
        spec: Filterbank settings.
    """
    count = num_frames(waveform.shape[0], spec)
    out[count:] = 0.0
    if count:
        _workspaces.get(spec).run(waveform, out[:count])


class _Tables(NamedTuple):
    """Constants of the CUDA kernel, with rows and columns of 0 up to round numbers.

    Each weight (float32) is the sum of two that TF32 holds exactly: 11 bits, and what is left.
    """

    cosines: Tensor  # [2, n_fft / 2, K], K >= (window - 1) // 2: hann * cos of the module's text
    sines: Tensor  # [2, n_fft / 2, K]
    mel: Tensor  # [2, F', n_fft / 2], F' >= F: whole blocks of filters
    spans: Tensor  # [blocks, 2] int32: the bins [first, last) that feed each block of filters


def _block_mels(n_mels: int) -> int:
    """Filters of a program: few, as each program leaves out the bins that feed none of its own."""
    return min(64, max(16, triton.next_power_of_2(n_mels)))


@lru_cache(maxsize=16)
def _tables(spec: FbankSpec, device: torch.device) -> _Tables:
    W, n_fft = spec.window, spec.n_fft
    pairs = (W - 1) // 2
    right = W // 2 + np.arange(pairs)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * right / (W - 1))
    if W % 2:
        hann[0] *= 0.5
    # In units of pi / n_fft, and reduced to one turn while they are whole numbers.
    angles = np.outer(np.arange(n_fft // 2), 2 * right - (W - 1)) % (2 * n_fft)
    radians = angles * (np.pi / n_fft)
    spare = -pairs % TABLE_COLUMNS
    block = _block_mels(spec.n_mels)
    mel = np.pad(mel_matrix(spec)[:-1].T, ((0, -spec.n_mels % block), (0, 0)))
    spans = []
    for rows in mel.reshape(-1, block, n_fft // 2):
        fed = np.flatnonzero(rows.any(axis=0))
        spans.append([int(fed[0]), int(fed[-1]) + 1] if len(fed) else [0, 0])
    padded = (
        np.pad(hann * np.cos(radians), ((0, 0), (0, spare))),
        np.pad(hann * np.sin(radians), ((0, 0), (0, spare))),
        mel,
    )

    def to_tf32(x: np.ndarray) -> np.ndarray:
        bits = x.astype(np.float32, order="C").view(np.int32)
        return ((bits + 0x1000) & -0x2000).view(np.float32)

    halves = (np.stack([to_tf32(x), to_tf32(x - to_tf32(x))]) for x in padded)
    with torch.inference_mode(False):  # else they were of no use outside of it later on
        cosines, sines, filters = (torch.tensor(pair, device=device) for pair in halves)
        bounds = torch.tensor(spans, dtype=torch.int32, device=device)
    return _Tables(cosines, sines, filters, bounds)


@triton.jit
def _dot_tf32x3(x, table, places, next_half, sums):
    """``sums`` + x @ table.T, about float32; tl.dot's "tf32x3" would split the table each time."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    low = x - high
    table_high = tl.load(table + places)
    table_low = tl.load(table + next_half + places)
    sums = tl.dot(low, table_high.T, sums, input_precision="tf32")
    sums = tl.dot(high, table_low.T, sums, input_precision="tf32")
    return tl.dot(high, table_high.T, sums, input_precision="tf32")


@triton.jit
def _emphasised(samples, mean, here, FACTOR: tl.constexpr):
    """The mean removed, then pre-emphasis."""
    sample = tl.load(samples, mask=here, other=0.0) - mean[:, None]
    previous = tl.load(samples - 1, mask=here, other=0.0) - mean[:, None]
    return sample - FACTOR * previous


@triton.jit
def _log_mel(
    waveform,
    here,
    cosines,
    sines,
    mel,
    next_half,
    first_bin,
    last_bin,
    WINDOW: tl.constexpr,
    HOP: tl.constexpr,
    FACTOR: tl.constexpr,
    FLOOR: tl.constexpr,
    NUM_BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MELS: tl.constexpr,
):
    """[BLOCK_T, BLOCK_MELS] of the frames from ``waveform`` on; those not ``here`` are not read."""
    HALF: tl.constexpr = WINDOW // 2
    PAIRS: tl.constexpr = (WINDOW - 1) // 2
    frames = waveform + tl.arange(0, BLOCK_T)[:, None] * HOP
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in range(0, WINDOW, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        sums += tl.load(frames + k, mask=here[:, None] & (k < WINDOW), other=0.0)
    mean = tl.sum(sums, 1) / WINDOW
    mels = tl.arange(0, BLOCK_MELS)
    energies = tl.zeros((BLOCK_T, BLOCK_MELS), tl.float32)
    for start in range(first_bin // BLOCK_BINS * BLOCK_BINS, last_bin, BLOCK_BINS):
        bins = start + tl.arange(0, BLOCK_BINS)
        real = tl.zeros((BLOCK_T, BLOCK_BINS), tl.float32)
        imaginary = tl.zeros((BLOCK_T, BLOCK_BINS), tl.float32)
        for first in range(0, PAIRS, BLOCK_K):
            m = first + tl.arange(0, BLOCK_K)
            inside = here[:, None] & (m < PAIRS)  # beyond, the tables are 0
            right = _emphasised(frames + (HALF + m), mean, inside, FACTOR)
            left = _emphasised(frames + (WINDOW - 1 - HALF - m), mean, inside, FACTOR)
            places = bins[:, None] * COLUMNS + m
            real = _dot_tf32x3(right + left, cosines, places, NUM_BINS * COLUMNS, real)
            imaginary = _dot_tf32x3(right - left, sines, places, NUM_BINS * COLUMNS, imaginary)
        power = real * real + imaginary * imaginary
        places = mels[:, None] * NUM_BINS + bins
        energies = _dot_tf32x3(power, mel, places, next_half, energies)
    return tl.log(tl.maximum(energies, FLOOR, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["S", "T"])
def _fbank_kernel(
    waveforms,
    num_samples,
    cosines,
    sines,
    mel,
    spans,
    out,
    stride,
    S,
    T,
    N_MELS: tl.constexpr,
    WINDOW: tl.constexpr,
    HOP: tl.constexpr,
    FACTOR: tl.constexpr,
    FLOOR: tl.constexpr,
    NUM_BINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MELS: tl.constexpr,
):
    """One program per clip, block of frames and block of filters."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_T
    length = tl.minimum(tl.load(num_samples + b), S)
    count = tl.where(length < WINDOW, 0, (length - WINDOW) // HOP + 1)  # may be more than T
    t = first + tl.arange(0, BLOCK_T)
    block = tl.program_id(2)
    mels = block * BLOCK_MELS + tl.arange(0, BLOCK_MELS)
    places = out + (b * T + t)[:, None] * N_MELS + mels
    wanted = (t < T)[:, None] & (mels < N_MELS)
    here = t < tl.minimum(count, T)
    if first < count:
        features = _log_mel(
            waveforms + b * stride + first * HOP, here, cosines, sines,
            mel + block * BLOCK_MELS * NUM_BINS, tl.num_programs(2) * BLOCK_MELS * NUM_BINS,
            tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1),
            WINDOW, HOP, FACTOR, FLOOR, NUM_BINS, COLUMNS, BLOCK_T, BLOCK_BINS, BLOCK_K, BLOCK_MELS,
        )  # fmt: skip
        tl.store(places, tl.where(here[:, None], features, 0.0), mask=wanted)
    else:
        tl.store(places, tl.zeros((BLOCK_T, BLOCK_MELS), tl.float32), mask=wanted)


@torch.library.custom_op("ssast::fbank", mutates_args=())
def _fbank(
    waveforms: Tensor,
    num_samples: Tensor,
    sample_rate_hz: int,
    n_mels: int,
    frames: int,
    low_hz: float,
) -> Tensor:
    spec = FbankSpec(sample_rate_hz, n_mels, frames, low_hz)
    return fbank_reference(waveforms, num_samples, spec)


@_fbank.register_kernel("cpu")
def _fbank_cpu(
    waveforms: Tensor,
    num_samples: Tensor,
    sample_rate_hz: int,
    n_mels: int,
    frames: int,
    low_hz: float,
) -> Tensor:
    spec = FbankSpec(sample_rate_hz, n_mels, frames, low_hz)
    out = torch.empty(waveforms.shape[0], frames, n_mels)
    for features, waveform, length in zip(out, waveforms, num_samples.tolist(), strict=True):
        fbank_into(features, waveform[:length], spec)
    return out


def _blocks(architecture: int, spec: FbankSpec) -> dict[str, int]:
    """The largest blocks without spills; 64 frames are the least that newer tensor cores take."""
    bins = 64 if architecture == 90 else 32
    return {
        "BLOCK_T": 64,
        "BLOCK_BINS": min(bins, spec.n_fft // 2),
        "BLOCK_K": 16,
        "BLOCK_MELS": _block_mels(spec.n_mels),
        "num_warps": 4,
        "num_stages": 2,
    }


@_fbank.register_kernel("cuda")
def _fbank_cuda(
    waveforms: Tensor,
    num_samples: Tensor,
    sample_rate_hz: int,
    n_mels: int,
    frames: int,
    low_hz: float,
) -> Tensor:
    spec = FbankSpec(sample_rate_hz, n_mels, frames, low_hz)
    if waveforms.dtype != torch.float32:
        return fbank_reference(waveforms, num_samples, spec)
    B, S = waveforms.shape
    out = torch.empty(B, frames, n_mels, dtype=torch.float32, device=waveforms.device)
    if B:
        if waveforms.stride(1) != 1:
            waveforms = waveforms.contiguous()
        tables = _tables(spec, waveforms.device)
        num_bins, columns = tables.cosines.shape[1:]
        blocks = _blocks(architecture(waveforms.device), spec)
        _fbank_kernel[B, triton.cdiv(frames, blocks["BLOCK_T"]), len(tables.spans)](
            waveforms, num_samples.contiguous(), *tables, out, waveforms.stride(0), S, frames,
            N_MELS=n_mels, WINDOW=spec.window, HOP=spec.hop, FACTOR=PREEMPHASIS, FLOOR=EPS,
            NUM_BINS=num_bins, COLUMNS=columns, **blocks,
        )  # fmt: skip
    return out


@_fbank.register_fake
def _fbank_fake(
    waveforms: Tensor,
    num_samples: Tensor,
    sample_rate_hz: int,
    n_mels: int,
    frames: int,
    low_hz: float,
) -> Tensor:
    return waveforms.new_empty(waveforms.shape[0], frames, n_mels)


def fbank(waveforms: Tensor, num_samples: Tensor, spec: FbankSpec) -> Tensor:
    """Log-mel filterbanks of a batch of clips, before normalisation.

    Args:
        waveforms: [B, S] float32 in [-1, 1] at ``spec.sample_rate_hz``, each clip's mean removed;
            what lies beyond a clip's end is not read.
        num_samples: [B] int64, samples of each clip, on the device of ``waveforms``.
        spec: Filterbank settings.

    Returns:
        [B, T, F] float32, 0 in frames after a clip's end. No gradient: this is data.

    Raises:
        ValueError: For another shape, dtype or device.
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
    with torch.no_grad():
        return _fbank(
            waveforms,
            num_samples,
            spec.sample_rate_hz,
            spec.n_mels,
            spec.num_frames,
            float(spec.low_hz),
        )
