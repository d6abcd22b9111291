"""Clips per CPU second: this project's audio stream against a plain loader.

Both turn the same FLAC files into the same Kaldi filterbanks. The plain loader is what most
training code does: soundfile and torchaudio's way of computing the filterbank (its
``compliance.kaldi`` written out) in a DataLoader with worker processes.

What is counted is CPU time, of worker processes as well: it does not depend on what else runs on
the machine as wall-clock time does. The two take turns, and the medians are compared.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssast.kernels.fbank import EPS, FbankSpec
from ssast.pipelines.dali import AudioStream

CLIP_S = 10.0


@dataclass(frozen=True)
class Result:
    """Medians over the rounds; times are per clip."""

    clips: int
    rounds: int
    plain_cpu_ms: float
    stream_cpu_ms: float
    plain_wall_ms: float
    stream_wall_ms: float
    ratio: float  # clips per CPU second of the stream over the plain loader's
    max_difference: float  # between the two filterbanks, log-mel


def plain_fbank(waveform: Tensor, spec: FbankSpec) -> Tensor:
    """Kaldi's filterbank as torchaudio 2 computes it: [S] float32 to [T, F] float32."""
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
    """The mel filters as torchaudio builds them, for every clip anew: [F, n_fft / 2 + 1]."""
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


class PlainDataset(Dataset[Tensor]):
    """One clip at a time, as a map-style dataset."""

    def __init__(self, paths: Sequence[Path], spec: FbankSpec) -> None:
        self.paths, self.spec = paths, spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        samples, _ = soundfile.read(self.paths[row], dtype="float32")
        return plain_fbank(torch.from_numpy(samples), self.spec)


def write_clips(folder: Path, count: int, *, seconds: float = CLIP_S) -> list[Path]:
    """Synthetic recordings: voiced sounds with moving formants over noise, as 16 kHz FLAC.

    Args:
        folder: Where to write them.
        count: How many.
        seconds: Length of each.

    Returns:
        The paths.
    """
    paths = []
    times = np.arange(int(16000 * seconds)) / 16000
    for row in range(count):
        random = np.random.default_rng(row)
        pitch_hz = random.uniform(80, 300) * (1 + 0.1 * np.sin(2 * np.pi * 3 * times))
        phase = 2 * np.pi * np.cumsum(pitch_hz) / 16000
        voice = sum(np.sin(k * phase) / k ** random.uniform(0.5, 2) for k in range(1, 20))
        loudness = np.clip(np.sin(2 * np.pi * random.uniform(0.5, 2) * times), 0, 1)
        sound = voice * loudness + 0.03 * random.standard_normal(len(times))
        path = folder / f"clip{row:05d}.flac"
        soundfile.write(path, 0.2 * sound, 16000, subtype="PCM_16")
        paths.append(path)
    return paths


def cpu_s() -> float:
    """CPU seconds of this process and of its living children."""
    total = time.process_time()
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(
    paths: Sequence[Path], spec: FbankSpec, *, batch_size: int, num_threads: int, rounds: int
) -> Result:
    """Let the two loaders read all clips in turn.

    Args:
        paths: 16 kHz mono files, a multiple of the batch size.
        spec: Filterbank settings.
        batch_size: Clips per batch.
        num_threads: Worker processes of the one, threads of the other.
        rounds: Times that each of them reads all clips.

    Returns:
        The medians.
    """
    plain: DataLoader[Tensor] = DataLoader(
        PlainDataset(paths, spec),
        batch_size=batch_size,
        num_workers=num_threads,
        persistent_workers=True,
    )
    first_plain = next(iter(plain))  # the workers start before there are threads to inherit
    with AudioStream(
        paths,
        spec,
        batch_size=batch_size,
        epochs=rounds + 1,
        device=torch.device("cpu"),
        num_threads=num_threads,
    ) as stream:
        batches = len(paths) // batch_size
        first_stream, *_ = (next(stream) for _ in range(batches))
        times: dict[str, list[tuple[float, float]]] = {"plain": [], "stream": []}

        def read_plain() -> None:
            for batch in plain:
                batch.sum()

        def read_stream() -> None:
            for _ in range(batches):
                next(stream).fbank.sum()

        for _ in range(rounds):
            for name, read in (("plain", read_plain), ("stream", read_stream)):
                times[name].append(_timed(read))
    medians = {
        name: [1e3 * statistics.median(column) / len(paths) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    return Result(
        clips=len(paths),
        rounds=rounds,
        plain_cpu_ms=medians["plain"][0],
        stream_cpu_ms=medians["stream"][0],
        plain_wall_ms=medians["plain"][1],
        stream_wall_ms=medians["stream"][1],
        ratio=medians["plain"][0] / medians["stream"][0],
        max_difference=float((first_plain - first_stream.fbank).abs().max()),
    )


def _timed(read: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = cpu_s(), time.perf_counter()
    read()
    return cpu_s() - cpu, time.perf_counter() - wall


def _rows(result: Result) -> Iterator[str]:
    yield f"{'loader':<36}{'CPU ms/clip':>13}{'clips/CPU s':>13}{'wall ms/clip':>14}"
    for name, cpu_ms, wall_ms in (
        ("soundfile + torch, DataLoader", result.plain_cpu_ms, result.plain_wall_ms),
        ("ssast AudioStream (DALI)", result.stream_cpu_ms, result.stream_wall_ms),
    ):
        yield f"{name:<36}{cpu_ms:>13.2f}{1e3 / cpu_ms:>13.0f}{wall_ms:>14.2f}"
    yield f"{result.ratio:.2f} times the clips per CPU second (medians of {result.rounds} rounds)"
    yield f"largest difference between the two filterbanks: {result.max_difference:.1e} (log-mel)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or JSON.

    Args:
        argv: Command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(prog="ssast bench data", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=128, help="clips to read (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="times to read them (default 5)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="workers or threads (default 2)")
    parser.add_argument("--data", type=Path, help="a folder of 16 kHz mono FLAC, not synthetic")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    spec = FbankSpec()
    count = args.batch_size * math.ceil(args.clips / args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            paths = write_clips(Path(folder), count)
        else:
            found = sorted(args.data.rglob("*.flac"))
            if not found:
                parser.error(f"{args.data} holds no .flac files")
            paths = [found[k % len(found)] for k in range(count)]
        result = measure(
            paths,
            spec,
            batch_size=args.batch_size,
            num_threads=args.threads,
            rounds=args.rounds,
        )
    print(json.dumps(asdict(result)) if args.json else "\n".join(_rows(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
