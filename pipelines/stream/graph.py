"""The DALI pipeline: encoded clips in, filterbanks out, on a CPU or a GPU.

With ``features="dali"`` Kaldi's filterbank is computed by DALI's own operators. Applied to a whole
clip, ``preemphasis_filter``, ``spectrogram`` and ``mel_filter_bank`` would not match Kaldi, which
subtracts the mean of each window and whose mel triangles are linear in mel, not in Hz. Instead:

- Overlapping windows are laid out as rows: for a window of q hops and a remainder, window t is rows
  t, ..., t + q - 1 of the clip reshaped to [., hop], and the first samples of row t + q.
- The rows, minus their means, are filtered as one long signal. Pre-emphasis leaks from one window
  only into the first sample of the next, where the Hann window is 0.
- Triangles of both kinds have the same end points. Each FFT bin feeds at most one even and one odd
  filter, so one gain per bin makes all even filters exact, and a second one all odd filters.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from ssast.kernels.fbank import EPS, PREEMPHASIS, FbankSpec, fbank_into, mel_matrix
from ssast.pipelines.errors import DataError

Node = Any  # DALI's DataNode: the operators' types are not declared
PREFETCH = 2  # batches in flight inside DALI


class FbankThreads:
    """The filterbank kernel as a DALI Python function, one clip at a time in each thread.

    It uses its own threads, with one OpenMP thread each: in DALI's threads, torch would start
    OpenMP teams that compete with those of the training step.

    Args:
        spec: Filterbank settings.
        batch_size: Largest number of clips in a call.
        num_threads: Number of threads.
    """

    def __init__(self, spec: FbankSpec, *, batch_size: int, num_threads: int) -> None:
        self._spec = spec
        # DALI copies the result of a Python function before the next call, so one output buffer is
        # enough: with new memory for every clip, page faults would cost as much as the FFT.
        with torch.inference_mode(False):  # the caller's mode does not apply in our threads
            self._out = torch.zeros(batch_size, spec.num_frames, spec.n_mels)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ssast-fbank")
        together = threading.Barrier(num_threads)

        def start() -> None:
            # Without this call the thread's first operation would use the process's number of
            # threads. With such an OpenMP team, libgomp puts the training step's own threads to
            # sleep between operations, which made that step 1.7 times slower.
            torch.get_num_threads()
            torch.set_num_threads(1)
            together.wait()

        # set_num_threads also affects threads that start later: restore the caller's number once
        # all of ours have started.
        num_torch_threads = torch.get_num_threads()
        wait([self._threads.submit(start) for _ in range(num_threads)])
        torch.set_num_threads(num_torch_threads)

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute the filterbanks of up to B waveforms [S_b] float32.

        Returns:
            Arrays [T, F] float32, valid until the next call.
        """
        outs = self._out[: len(waveforms)]
        wait_for = [
            self._threads.submit(fbank_into, out, torch.from_numpy(waveform), self._spec)
            for out, waveform in zip(outs, waveforms, strict=True)
        ]
        for future in wait_for:
            future.result()
        return list(outs.numpy())

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=True)


def _mel_operator(power: Node, spec: FbankSpec) -> Node:
    return fn.mel_filter_bank(
        fn.reshape(power, layout="tf"),  # time first: twice as fast as frequency first on a CPU
        nfilter=spec.n_mels,
        sample_rate=spec.sample_rate_hz,
        freq_low=spec.low_hz,
        freq_high=spec.sample_rate_hz / 2,
        mel_formula="htk",
        normalize=False,
    )


@lru_cache(maxsize=16)
def mel_gains(spec: FbankSpec) -> tuple[np.ndarray, np.ndarray]:
    """Compute gains per FFT bin that turn DALI's mel filters into Kaldi's.

    DALI's weights are read back by applying its operator to the identity matrix.

    Args:
        spec: Filterbank settings.

    Returns:
        Gains of the even and of the odd filters, [1, n_fft / 2 + 1] float32 each.

    Raises:
        DataError: The filters of this version of DALI have other end points than Kaldi's.
    """
    num_bins = spec.n_fft // 2 + 1
    probe = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with probe:
        identity = types.Constant(np.eye(num_bins, dtype=np.float32), device="cpu")
        probe.set_outputs(_mel_operator(identity, spec))
    probe.build()
    theirs = np.array(probe.run()[0][0], dtype=np.float64)
    ours = mel_matrix(spec)
    gains = []
    for parity in (0, 1):
        have, want = theirs[:, parity::2], ours[:, parity::2]
        if ((have > 0).sum(axis=1) > 1).any() or (want[have <= 0] > 1e-4).any():
            raise DataError(f"DALI's mel filters do not fit {spec}: use the torch filterbank")
        ratio = np.divide(want, have, out=np.zeros_like(want), where=have > 0)
        gains.append(ratio.sum(axis=1, dtype=np.float64).astype(np.float32)[None])
    return gains[0], gains[1]


def kaldi_fbank(waveform: Node, num_samples: Node, spec: FbankSpec, device: str) -> Node:
    """Compute the filterbank with DALI's operators.

    Args:
        waveform: Samples [S] float32 on ``device``.
        num_samples: Number of samples S, [1] int32 on the CPU.
        spec: Filterbank settings.
        device: "cpu" or "gpu".

    Returns:
        Filterbank [T, F] float32 on ``device``, 0 in padding frames.
    """
    window, hop, frames = spec.window, spec.hop, spec.num_frames
    whole, rest = divmod(window, hop)
    rows = fn.reshape(_cut(waveform, (frames + whole) * hop, "pad"), shape=[frames + whole, hop])
    parts = [fn.slice(rows, [k, 0], [frames, hop], axes=[0, 1]) for k in range(whole)]
    if rest:
        parts.append(fn.slice(rows, [whole, 0], [frames, rest], axes=[0, 1]))
    windows = fn.cat(*parts, axis=1)
    windows = windows - fn.reductions.mean(windows, axes=[1], keep_dims=True)
    signal = fn.preemphasis_filter(
        fn.reshape(windows, shape=[frames * window]), preemph_coeff=PREEMPHASIS
    )
    power = fn.spectrogram(
        signal,
        nfft=spec.n_fft,
        window_length=window,
        window_step=window,
        window_fn=[0.5 - 0.5 * math.cos(2 * math.pi * k / (window - 1)) for k in range(window)],
        center_windows=False,
        layout="tf",
    )
    even, odd = (types.Constant(gains, device=device) for gains in mel_gains(spec))
    is_even = (np.arange(spec.n_mels) % 2 == 0).astype(np.float32)[None]
    mel = _mel_operator(power * even, spec) * types.Constant(is_even, device=device)
    mel = mel + _mel_operator(power * odd, spec) * types.Constant(1 - is_even, device=device)
    # frame t is valid if t * hop + window <= S
    ends = types.Constant(np.arange(frames, dtype=np.int32)[:, None] * hop + window, device="cpu")
    valid = fn.cast(ends <= num_samples, dtype=types.FLOAT)
    return dali_math.log(dali_math.max(mel, EPS)) * (valid.gpu() if device == "gpu" else valid)


def decoded_clips(
    source: Callable[..., tuple[list[np.ndarray], list[np.ndarray]]],
) -> tuple[Node, Node]:
    """Add the operators that always run on the CPU: read and decode.

    Args:
        source: See :func:`build_pipeline`.

    Returns:
        Waveforms [S] float32 and labels [3] int64.
    """
    encoded, labels = fn.external_source(
        source=source,
        num_outputs=2,
        batch=True,
        batch_info=True,
        dtype=[types.UINT8, types.INT64],
        ndim=[1, 1],
    )
    waveform, _ = fn.decoders.audio(encoded, dtype=types.FLOAT, downmix=True)
    return waveform, labels


def _cut(waveform: Node, num_samples: int, shorter: Literal["pad", "trim_to_shape"]) -> Node:
    """Cut [S] to [num_samples]; pad a shorter waveform, or leave it as it is."""
    return fn.slice(waveform, 0, num_samples, axes=[0], out_of_bounds_policy=shorter)


def build_pipeline(
    source: Callable[..., tuple[list[np.ndarray], list[np.ndarray]]],
    spec: FbankSpec,
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    features: FbankThreads | Literal["dali", "waveform"],
) -> Pipeline:
    """Build the pipeline.

    Args:
        source: Callback of an external source with ``batch`` and ``batch_info``: encoded mono clips
            at the sample rate of ``spec``, and labels.
        spec: Filterbank settings.
        batch_size: Clips per batch.
        num_threads: DALI's CPU threads.
        device_id: GPU of the outputs; None for a CPU pipeline.
        features: :class:`FbankThreads` compute filterbanks in a CPU pipeline; "dali": DALI's
            operators, on the GPU if there is one; "waveform": no filterbank, the samples are cut or
            padded to ``spec.num_samples``.

    Returns:
        A pipeline with three outputs: filterbank [T, F] or waveform [S], float32; number of valid
        samples [1] int32 (CPU); labels [3] int64 (CPU).
    """
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=PREFETCH,
    )
    with pipeline:
        # The clip's mean need not be subtracted, as each window's own mean is.
        waveform, labels = decoded_clips(source)
        num_samples = dali_math.min(waveform.shape(dtype=types.INT32), spec.num_samples)
        device = "cpu" if device_id is None else "gpu"
        if device == "gpu":  # copy only the samples that are used
            waveform = _cut(waveform, spec.num_samples, "trim_to_shape").gpu()
        if features == "dali":
            output = kaldi_fbank(waveform, num_samples, spec, device)
        elif features == "waveform":
            output = _cut(waveform, spec.num_samples, "pad")
        else:
            output = fn.python_function(waveform, function=features, batch_processing=True)
        pipeline.set_outputs(output, num_samples, labels)
    pipeline.build()
    return pipeline
