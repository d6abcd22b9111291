"""The loaders of the data benchmark: plain ones, and the stream without its last stage."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import soundfile
import torch
from nvidia.dali import Pipeline
from torch import Tensor
from torch.utils.data import Dataset

from ssast.kernels.fbank import EPS, FbankSpec
from ssast.pipelines.clips.shards import ClipPaths
from ssast.pipelines.stream.graph import PREFETCH, decoded_clips
from ssast.pipelines.stream.source import ClipSource
from ssast.pipelines.text import one_line

Compute = Callable[[Path, FbankSpec], Tensor]  # returns the filterbank [T, F] of a file


def plain_fbank(waveform: Tensor, spec: FbankSpec) -> Tensor:
    """Compute Kaldi's filterbank as torchaudio 2 does, [S] float32 to [T, F] float32."""
    waveform = waveform - waveform.mean()
    count = 1 + (len(waveform) - spec.window) // spec.hop
    frames = waveform.as_strided((count, spec.window), (spec.hop, 1))
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.nn.functional.pad(frames[None], (1, 0), mode="replicate")[0]
    frames = frames - 0.97 * before[:, :-1]
    frames = frames * torch.hann_window(spec.window, periodic=False)[None]
    frames = torch.nn.functional.pad(frames[None], (0, spec.n_fft - spec.window))[0]
    power = torch.fft.rfft(frames).abs().pow(2.0)
    mel = torch.mm(power, plain_mel_matrix(spec).T)
    features = torch.max(mel, torch.tensor(EPS)).log()[: spec.num_frames]
    return torch.nn.functional.pad(features, (0, 0, 0, spec.num_frames - len(features)))


def plain_mel_matrix(spec: FbankSpec) -> Tensor:
    """Build the mel filters [F, n_fft / 2 + 1], as torchaudio does again for every clip."""
    low = 1127.0 * math.log(1.0 + spec.low_hz / 700.0)
    high = 1127.0 * math.log(1.0 + spec.sample_rate_hz / 2 / 700.0)
    delta = (high - low) / (spec.n_mels + 1)
    row = torch.arange(spec.n_mels).unsqueeze(1)
    left, centre, right = (low + (row + k) * delta for k in range(3))
    hz = spec.sample_rate_hz / spec.n_fft * torch.arange(spec.n_fft // 2)
    mel = (1127.0 * (1.0 + hz / 700.0).log()).unsqueeze(0)
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    weights = torch.max(torch.zeros(1), torch.min(rising, falling))
    return torch.nn.functional.pad(weights, (0, 1))


def with_soundfile(path: Path, spec: FbankSpec) -> Tensor:
    """Decode with libsndfile."""
    samples, _ = soundfile.read(path, dtype="float32")
    return plain_fbank(torch.from_numpy(samples), spec)


def with_torchcodec(path: Path, spec: FbankSpec) -> Tensor:
    """Decode with FFmpeg."""
    from torchcodec.decoders import AudioDecoder  # type: ignore[import-not-found]

    return plain_fbank(AudioDecoder(path).get_all_samples().data[0], spec)


def with_torchaudio(path: Path, spec: FbankSpec) -> Tensor:
    """Decode with libsndfile and compute the filterbank with torchaudio."""
    from torchaudio.compliance import kaldi

    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = torch.from_numpy(samples.T)
    features: Tensor = kaldi.fbank(
        waveform - waveform.mean(),
        htk_compat=True,
        sample_frequency=rate_hz,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=spec.n_mels,
        dither=0.0,
        frame_shift=10,
    )[: spec.num_frames]
    return torch.nn.functional.pad(features, (0, 0, 0, spec.num_frames - len(features)))


def plain_loaders() -> tuple[dict[str, Compute], list[str]]:
    """Return the plain loaders by name, and a line for each that cannot be imported here."""
    found: dict[str, Compute] = {"soundfile": with_soundfile}
    missing = []
    for name, needed, compute in (
        ("torchcodec", "torchcodec.decoders", with_torchcodec),
        ("torchaudio", "torchaudio.compliance.kaldi", with_torchaudio),
    ):
        try:
            importlib.import_module(needed)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # no FFmpeg, other torch
            missing.append(f"not compared with {name}: {one_line(error):.200}")
        else:
            found[name] = compute
    return found, missing


class PlainDataset(Dataset[Tensor]):
    """A map-style dataset of filterbanks."""

    def __init__(self, paths: Sequence[Path], spec: FbankSpec, compute: Compute) -> None:
        self.paths, self.spec, self.compute = paths, spec, compute

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return self.compute(self.paths[row], self.spec)


class DecodedStream:
    """The stream's source and decoder, without the filterbanks that a GPU would compute."""

    def __init__(self, paths: ClipPaths, spec: FbankSpec, batch_size: int, threads: int):
        self.source = ClipSource(
            paths, spec, batch_size=batch_size, epochs=1 << 20, num_threads=threads
        )
        self.pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=PREFETCH,
        )
        with self.pipeline:
            self.pipeline.set_outputs(*decoded_clips(self.source))
        self.pipeline.build()

    def __next__(self) -> None:
        self.pipeline.run()

    def close(self) -> None:
        """Stop all threads."""
        self.pipeline = None
        self.source.close()
