"""Clips per CPU second: this project's audio stream against a plain loader.

Both turn the same files into the same Kaldi filterbanks. The plain loader is what most training
code does: soundfile and torchaudio's way of computing the filterbank (its ``compliance.kaldi``
written out) in a DataLoader with worker processes. "Decoding alone" is the same stream without its
filterbanks: what is left for the CPU where a GPU computes them.

What is counted is CPU time, of worker processes as well: it does not depend on what else runs on
the machine as wall-clock time does. All take turns, and the medians are compared.
"""

import argparse
import itertools
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
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
import soundfile
import torch
from matplotlib import pyplot as plt
from nvidia.dali import Pipeline
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssast.kernels.fbank import EPS, FbankSpec, num_frames
from ssast.pipelines.dali import AudioStream
from ssast.pipelines.graph import PREFETCH, decoded_clips
from ssast.pipelines.source import ClipSource

CLIP_S = 10.0
SUBTYPES = {"flac": "PCM_16", "wav": "PCM_16", "ogg": "VORBIS"}


@dataclass(frozen=True)
class Result:
    """Medians over the rounds; times are per clip."""

    kind: str  # format of the files
    seconds: float  # length of a clip
    clips: int
    rounds: int
    plain_cpu_ms: float
    stream_cpu_ms: float
    decode_cpu_ms: float  # the stream without filterbanks
    read_cpu_ms: float  # of these, to get the bytes that DALI decodes
    plain_wall_ms: float
    stream_wall_ms: float
    ratio: float  # clips per CPU second of the stream over the plain loader's
    decode_ratio: float  # of decoding alone over the plain loader's
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


def write_clips(
    folder: Path, count: int, *, seconds: float = CLIP_S, kind: str = "flac"
) -> list[Path]:
    """Synthetic recordings: voiced sounds with moving formants over noise, 16 kHz mono.

    Args:
        folder: Where to write them.
        count: How many.
        seconds: Length of each.
        kind: "flac", "wav" or "ogg".

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
        path = folder / f"clip{row:05d}.{kind}"
        soundfile.write(path, 0.2 * sound, 16000, subtype=SUBTYPES[kind])
        paths.append(path)
    return paths


def cpu_s() -> float:
    """CPU seconds of this process and of its living children."""
    total = time.process_time()
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class DecodedStream:
    """The stream's source and decoder, without what a GPU would do after them."""

    def __init__(self, paths: Sequence[Path], spec: FbankSpec, batch_size: int, threads: int):
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
            self.pipeline.set_outputs(*decoded_clips(self.source, spec))
        self.pipeline.build()

    def __next__(self) -> None:
        self.pipeline.run()

    def close(self) -> None:
        """End all threads."""
        self.pipeline = None
        self.source.close()


def measure(
    paths: Sequence[Path],
    spec: FbankSpec,
    *,
    batch_size: int,
    num_threads: int,
    rounds: int,
    seconds: float = CLIP_S,
) -> Result:
    """Let the loaders read all clips in turn.

    Args:
        paths: 16 kHz mono files, a multiple of the batch size.
        spec: Filterbank settings.
        batch_size: Clips per batch.
        num_threads: Worker processes of the one, threads of the others.
        rounds: Times that each of them reads all clips.
        seconds: Length of a clip, for the report.

    Returns:
        The medians.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for the next sum would count as well
    plain: DataLoader[Tensor] = DataLoader(
        PlainDataset(paths, spec),
        batch_size=batch_size,
        num_workers=num_threads,
        persistent_workers=True,
    )
    first_plain = next(iter(plain))  # the workers start before there are threads to inherit
    decoded = DecodedStream(paths, spec, batch_size, num_threads)
    source = ClipSource(
        paths, spec, batch_size=batch_size, epochs=1 << 20, num_threads=num_threads, read_ahead=0
    )
    iterations = itertools.count()
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
        next(decoded)

        def read_plain() -> None:
            for batch in plain:
                batch.sum()

        def read_stream() -> None:
            for _ in range(batches):
                next(stream).fbank.sum()

        def read_decoded() -> None:
            for _ in range(batches):
                next(decoded)

        def read_bytes() -> None:
            for _ in range(batches):
                source(SimpleNamespace(iteration=next(iterations)))

        loaders = {
            "plain": read_plain,
            "stream": read_stream,
            "decode": read_decoded,
            "read": read_bytes,
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, read in loaders.items():
                times[name].append(_timed(read))
    decoded.close()
    source.close()
    torch.set_num_threads(torch_threads)
    medians = {
        name: [1e3 * statistics.median(column) / len(paths) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    return Result(
        kind=paths[0].suffix[1:],
        seconds=seconds,
        clips=len(paths),
        rounds=rounds,
        plain_cpu_ms=medians["plain"][0],
        stream_cpu_ms=medians["stream"][0],
        decode_cpu_ms=medians["decode"][0],
        read_cpu_ms=medians["read"][0],
        plain_wall_ms=medians["plain"][1],
        stream_wall_ms=medians["stream"][1],
        ratio=medians["plain"][0] / medians["stream"][0],
        decode_ratio=medians["plain"][0] / medians["decode"][0],
        max_difference=float((first_plain - first_stream.fbank).abs().max()),
    )


def _timed(read: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = cpu_s(), time.perf_counter()
    read()
    wall = time.perf_counter() - wall
    # Whoever reads ahead goes on for a while: as much as was ready at the start.
    now, before = cpu_s(), cpu
    while now - before > 0.002:
        time.sleep(0.02)
        now, before = cpu_s(), now
    return now - cpu, wall


def _rows(result: Result) -> Iterator[str]:
    r = result
    yield f"{r.kind}, {r.seconds:g} s, {r.clips} clips, medians of {r.rounds} rounds"
    yield f"  {'':<34}{'CPU ms/clip':>12}{'clips/CPU s':>12}{'times plain':>12}"
    for name, cpu_ms in (
        ("soundfile + torch, DataLoader", r.plain_cpu_ms),
        ("AudioStream", r.stream_cpu_ms),
        ("AudioStream, decoding alone", r.decode_cpu_ms),
    ):
        times = r.plain_cpu_ms / cpu_ms
        yield f"  {name:<34}{cpu_ms:>12.2f}{1e3 / cpu_ms:>12.0f}{times:>12.2f}"
    stages = (
        ("read", r.read_cpu_ms),
        ("decode", r.decode_cpu_ms - r.read_cpu_ms),
        ("filterbank", r.stream_cpu_ms - r.decode_cpu_ms),
    )
    yield "  CPU ms by stage: " + ", ".join(f"{name} {ms:.2f}" for name, ms in stages)
    yield (
        f"  16 cores feed {16e3 / r.stream_cpu_ms:,.0f} clips/s with filterbanks, "
        f"{16e3 / r.decode_cpu_ms:,.0f} where a GPU computes them"
    )
    yield f"  largest difference between the two filterbanks: {r.max_difference:.1e} (log-mel)"


def plot(results: Sequence[Result], path: Path) -> None:
    """CPU time of a clip by loader, the stream's split into its stages."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(results)), layout="constrained")
    for row, r in enumerate(results):
        axes.barh(row - 0.2, r.plain_cpu_ms, 0.38, color="grey", label="plain loader")
        left = 0.0
        for name, ms, colour in (
            ("read", r.read_cpu_ms, "tab:green"),
            ("decode", r.decode_cpu_ms - r.read_cpu_ms, "tab:orange"),
            ("filterbank", r.stream_cpu_ms - r.decode_cpu_ms, "tab:blue"),
        ):
            axes.barh(row + 0.2, ms, 0.38, left, color=colour, label=f"AudioStream: {name}")
            left += ms
        axes.text(r.plain_cpu_ms, row, f"  {r.ratio:.2f} times the clips", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [f"{r.kind}, {r.seconds:g} s" for r in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(r.plain_cpu_ms for r in results))
    axes.set_xlabel("CPU ms a clip")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:4], labels[:4])  # every row brings the same four
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    parser.add_argument("--kinds", nargs="+", choices=list(SUBTYPES), default=["flac", "wav"])
    parser.add_argument("--seconds", nargs="+", type=float, default=[CLIP_S], help="(default 10)")
    parser.add_argument("--data", type=Path, help="a folder of 16 kHz mono FLAC, not synthetic")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--plot", type=Path, help="draw the results, PNG")
    args = parser.parse_args(argv)
    if args.rounds < 1 or min(args.seconds) < 0.1:
        parser.error("needs at least 1 round and 0.1 seconds")
    count = args.batch_size * math.ceil(args.clips / args.batch_size)
    results = []

    def add(paths: Sequence[Path], seconds: float) -> None:
        spec = FbankSpec()
        spec = FbankSpec(num_frames=min(1024, num_frames(int(16000 * seconds), spec)))
        results.append(
            measure(
                paths,
                spec,
                batch_size=args.batch_size,
                num_threads=args.threads,
                rounds=args.rounds,
                seconds=seconds,
            )
        )
        if not args.json:
            print("\n".join(_rows(results[-1])), flush=True)

    if args.data is not None:
        found = sorted(args.data.rglob("*.flac"))
        if not found:
            parser.error(f"{args.data} holds no .flac files")
        add([found[k % len(found)] for k in range(count)], args.seconds[0])
    else:
        for kind in args.kinds:
            for seconds in args.seconds:
                with tempfile.TemporaryDirectory() as folder:
                    add(write_clips(Path(folder), count, seconds=seconds, kind=kind), seconds)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    if args.plot is not None:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
