"""The filterbank on CUDA: from samples to log-mel in one kernel.

The kernel takes a block of frames of a clip from samples to log-mel. The power does not
change when a frame is moved in time, so the frame is centred on 0. Of a frame x after the
pre-emphasis, with W its length and H = W // 2, the sums and differences of samples at the same
distance from the centre,

    even[m] = x[H + m] + x[W - 1 - H - m]        odd[m] = x[H + m] - x[W - 1 - H - m]

are all that the real and the imaginary part of the transform see (the hann window is symmetric,
and leaves nothing of samples 0 and W - 1):

    real[f] = sum_m even[m] hann[H + m] cos(2 pi f (H + m - (W - 1) / 2) / n_fft)
    imaginary[f] = sum_m odd[m] hann[H + m] sin(2 pi f (H + m - (W - 1) / 2) / n_fft)

for 0 <= m < (W - 1) // 2; of an odd W the middle sample, which meets itself, counts half. These
are two matmuls of half the plain DFT's size, on tensor cores with three TF32 matmuls for one in
float32; so is the one with ``mel``. A program computes up to 64 filters from the bins that feed
them alone.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture, on_its_device
from ssast.kernels.mel import EPS, PREEMPHASIS, FbankSpec, mel_matrix

TABLE_COLUMNS = 32  # the number of columns of a table is a multiple of this


class _Tables(NamedTuple):
    """Constants of the CUDA kernel, with rows and columns of 0 up to round numbers.

    Each weight (float32) is the sum of two that TF32 holds exactly: 11 bits, and what is left.
    """

    cosines: Tensor  # [2, n_fft / 2, K], K >= (window - 1) // 2: hann * cos of the module's text
    sines: Tensor  # [2, n_fft / 2, K]
    mel: Tensor  # [2, F', n_fft / 2], F' >= F: whole blocks of filters
    spans: Tensor  # [blocks, 2] int32: the bins [first, last) that feed each block of filters


def _block_mels(n_mels: int) -> int:
    """Return the filters of a program: few, as a program skips the bins that feed none of them."""
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
    with torch.inference_mode(False):  # tensors made in it cannot be used outside of it later
        cosines, sines, filters = (torch.tensor(pair, device=device) for pair in halves)
        bounds = torch.tensor(spans, dtype=torch.int32, device=device)
    return _Tables(cosines, sines, filters, bounds)


@triton.jit
def _dot_tf32x3(x, table, offsets, next_half, sums):
    """Compute sums + x @ table.T in about float32; "tf32x3" would split the table every time."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    low = x - high
    table_high = tl.load(table + offsets)
    table_low = tl.load(table + next_half + offsets)
    sums = tl.dot(low, table_high.T, sums, input_precision="tf32")
    sums = tl.dot(high, table_low.T, sums, input_precision="tf32")
    return tl.dot(high, table_high.T, sums, input_precision="tf32")


@triton.jit
def _emphasised(samples, mean, valid, FACTOR: tl.constexpr):
    """Subtract the mean, then apply pre-emphasis."""
    sample = tl.load(samples, mask=valid, other=0.0) - mean[:, None]
    previous = tl.load(samples - 1, mask=valid, other=0.0) - mean[:, None]
    return sample - FACTOR * previous


@triton.jit
def _log_mel(
    waveform,
    valid,
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
    """Compute [BLOCK_T, BLOCK_MELS] of the frames from ``waveform`` on that are ``valid``."""
    HALF: tl.constexpr = WINDOW // 2
    PAIRS: tl.constexpr = (WINDOW - 1) // 2
    frames = waveform + tl.arange(0, BLOCK_T)[:, None] * HOP
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in range(0, WINDOW, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        sums += tl.load(frames + k, mask=valid[:, None] & (k < WINDOW), other=0.0)
    mean = tl.sum(sums, 1) / WINDOW
    mels = tl.arange(0, BLOCK_MELS)
    energies = tl.zeros((BLOCK_T, BLOCK_MELS), tl.float32)
    for start in range(first_bin // BLOCK_BINS * BLOCK_BINS, last_bin, BLOCK_BINS):
        bins = start + tl.arange(0, BLOCK_BINS)
        real = tl.zeros((BLOCK_T, BLOCK_BINS), tl.float32)
        imaginary = tl.zeros((BLOCK_T, BLOCK_BINS), tl.float32)
        for first in range(0, PAIRS, BLOCK_K):
            m = first + tl.arange(0, BLOCK_K)
            inside = valid[:, None] & (m < PAIRS)  # beyond, the tables are 0
            right = _emphasised(frames + (HALF + m), mean, inside, FACTOR)
            left = _emphasised(frames + (WINDOW - 1 - HALF - m), mean, inside, FACTOR)
            offsets = bins[:, None] * COLUMNS + m
            real = _dot_tf32x3(right + left, cosines, offsets, NUM_BINS * COLUMNS, real)
            imaginary = _dot_tf32x3(right - left, sines, offsets, NUM_BINS * COLUMNS, imaginary)
        power = real * real + imaginary * imaginary
        offsets = mels[:, None] * NUM_BINS + bins
        energies = _dot_tf32x3(power, mel, offsets, next_half, energies)
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
    offsets = out + (b * T + t)[:, None] * N_MELS + mels
    wanted = (t < T)[:, None] & (mels < N_MELS)
    valid = t < tl.minimum(count, T)
    if first < count:
        features = _log_mel(
            waveforms + b * stride + first * HOP, valid, cosines, sines,
            mel + block * BLOCK_MELS * NUM_BINS, tl.num_programs(2) * BLOCK_MELS * NUM_BINS,
            tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1),
            WINDOW, HOP, FACTOR, FLOOR, NUM_BINS, COLUMNS, BLOCK_T, BLOCK_BINS, BLOCK_K, BLOCK_MELS,
        )  # fmt: skip
        tl.store(offsets, tl.where(valid[:, None], features, 0.0), mask=wanted)
    else:
        tl.store(offsets, tl.zeros((BLOCK_T, BLOCK_MELS), tl.float32), mask=wanted)


def _blocks(architecture: int, spec: FbankSpec) -> dict[str, int]:
    """Return the largest blocks without spills; newer tensor cores need at least 64 frames."""
    bins = 64 if architecture == 90 else 32
    return {
        "BLOCK_T": 64,
        "BLOCK_BINS": min(bins, spec.n_fft // 2),
        "BLOCK_K": 16,
        "BLOCK_MELS": _block_mels(spec.n_mels),
        "num_warps": 4,
        "num_stages": 2,
    }


@on_its_device
def fbank_on_cuda(waveforms: Tensor, num_samples: Tensor, spec: FbankSpec) -> Tensor:
    """Launch the kernel; see :func:`ssast.kernels.fbank.fbank`."""
    B, S = waveforms.shape
    out = torch.empty(B, spec.num_frames, spec.n_mels, dtype=torch.float32, device=waveforms.device)
    if waveforms.stride(1) != 1:
        waveforms = waveforms.contiguous()
    tables = _tables(spec, waveforms.device)
    num_bins, columns = tables.cosines.shape[1:]
    blocks = _blocks(architecture(waveforms.device), spec)
    _fbank_kernel[B, triton.cdiv(spec.num_frames, blocks["BLOCK_T"]), len(tables.spans)](
        waveforms, num_samples.contiguous(), *tables, out,
        waveforms.stride(0), S, spec.num_frames,
        N_MELS=spec.n_mels, WINDOW=spec.window, HOP=spec.hop, FACTOR=PREEMPHASIS, FLOOR=EPS,
        NUM_BINS=num_bins, COLUMNS=columns, **blocks,
    )  # fmt: skip
    return out
