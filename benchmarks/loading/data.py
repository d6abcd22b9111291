"""Measure clips per CPU second: the audio stream against plain loaders.

All compute the same Kaldi filterbanks from the same files. The plain loader is typical training
code: soundfile and the filterbank of torchaudio's ``compliance.kaldi`` (reimplemented here) in a
DataLoader with worker processes. Where they are installed, a second one decodes with torchcodec and
a third one calls torchaudio itself. "Decoding alone" is the stream without its filterbanks: what
the CPU does where a GPU computes them. With ``--shards``, the stream also reads the same clips from
prepared shards.

CPU time is measured, that of worker processes included, since wall-clock time depends on what else
runs on the machine. The loaders take turns, and their medians are compared. On a GPU the stream
computes its filterbanks there, and wall-clock time is shown as well.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssast.benchmarks.device import CPU, add_device_option, find_device
from ssast.benchmarks.loading.loaders import DecodedStream, PlainDataset, plain_loaders
from ssast.benchmarks.loading.report import Result, plot, table
from ssast.kernels.fbank import FbankSpec, num_frames
from ssast.pipelines.audio.convert import Recipe
from ssast.pipelines.clips.manifest import write_manifest
from ssast.pipelines.clips.shards import ShardIndex
from ssast.pipelines.prepare.pack import Packing, prepare_shards
from ssast.pipelines.stream.source import ClipSource
from ssast.pipelines.stream.stream import AudioStream

CLIP_S = 10.0
SUBTYPES = {"flac": "PCM_16", "wav": "PCM_16", "ogg": "VORBIS"}
ENDLESS = 1 << 20  # epochs


def write_clips(
    folder: Path, count: int, *, seconds: float = CLIP_S, kind: str = "flac"
) -> list[Path]:
    """Write synthetic recordings, harmonic tones over noise, 16 kHz mono.

    Args:
        folder: Folder of the files; it exists.
        count: Number of files.
        seconds: Length of each in s.
        kind: "flac", "wav" or "ogg".

    Returns:
        Paths of the files.
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


def write_shards(folder: Path, paths: Sequence[Path], kind: str) -> ShardIndex:
    """Pack files into shards, each as one clip, and return the clips in the same order.

    Args:
        folder: Folder of the shards.
        paths: Paths of the files; one that is listed several times is packed once.
        kind: "wav" for WAV, anything else for FLAC.
    """
    unique = sorted(set(paths))
    write_manifest(folder / "clips.json", [path.absolute() for path in unique])
    packing = Packing(Recipe(clip_s=86_400.0, min_s=0.0), "wav" if kind == "wav" else "flac")
    settings = {"progress": False, "log": lambda line: None}
    prepare_shards(folder / "clips.json", folder / "shards", packing, **settings)  # type: ignore[arg-type]
    row = {path: number for number, path in enumerate(unique)}
    return ShardIndex(folder / "shards").subset(np.array([row[path] for path in paths]))


def spec_of(seconds: float) -> FbankSpec:
    """Return filterbank settings for clips of this length in s."""
    return FbankSpec(num_frames=min(1024, num_frames(int(16000 * seconds), FbankSpec())))


def cpu_s() -> float:
    """Return the CPU seconds of this process and its running worker processes."""
    total = time.process_time()
    for child in active_children():
        times = psutil.Process(child.pid).cpu_times()
        total += times.user + times.system
    return total


def measure(
    paths: Sequence[Path],
    spec: FbankSpec,
    *,
    batch_size: int,
    num_threads: int,
    rounds: int,
    seconds: float = CLIP_S,
    shards: ShardIndex | None = None,
    device: torch.device = CPU,
) -> Result:
    """Measure all loaders on the same clips.

    Args:
        paths: Paths of 16 kHz mono files, a multiple of the batch size.
        spec: Filterbank settings.
        batch_size: Clips per batch.
        num_threads: Worker processes of a plain loader, threads of the stream.
        rounds: Number of times that each loader reads all clips.
        seconds: Length of a clip in s, for the report.
        shards: The same clips in shards, to be measured as well.
        device: Where the stream computes filterbanks.

    Returns:
        The medians over the rounds.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle OpenMP threads spin, which would count as CPU time
    num_batches = len(paths) // batch_size
    passes: dict[str, Callable[[], None]] = {}
    first: list[Tensor] = []  # the first batch of each loader
    for name, compute in plain_loaders()[0].items():
        plain: DataLoader[Tensor] = DataLoader(
            PlainDataset(paths, spec, compute),
            batch_size=batch_size,
            num_workers=num_threads,
            persistent_workers=True,
        )
        first.append(next(iter(plain)))  # forks the workers before the streams start threads
        passes[name] = partial(_plain_pass, plain)
    with ExitStack() as stack:
        for name, clips in {"files": paths, "shards": shards}.items():
            if clips is None:
                continue
            stream = stack.enter_context(
                AudioStream(
                    clips,
                    spec,
                    batch_size=batch_size,
                    epochs=rounds + 1,
                    device=device,
                    num_threads=num_threads,
                )
            )
            first.append(next(stream).fbank.cpu())
            for _ in range(num_batches - 1):
                next(stream)
            passes[name] = partial(_stream_pass, stream, num_batches)
            decoded = DecodedStream(clips, spec, batch_size, num_threads)
            stack.callback(decoded.close)
            next(decoded)
            passes[f"{name} decode"] = partial(_decode_pass, decoded, num_batches)
            source = ClipSource(
                clips,
                spec,
                batch_size=batch_size,
                epochs=ENDLESS,
                num_threads=num_threads,
                read_ahead=0,
            )
            stack.callback(source.close)
            passes[f"{name} read"] = partial(_read_pass, source, itertools.count(), num_batches)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
        for _ in range(rounds):
            for name, read in passes.items():
                times[name].append(_timed(read))
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
        cpu_ms={name: cpu_ms for name, (cpu_ms, _) in medians.items()},
        wall_ms={name: wall_ms for name, (_, wall_ms) in medians.items()},
        max_difference=max(float((first[0] - other).abs().max()) for other in first[1:]),
        device=str(device),
    )


def _plain_pass(loader: "DataLoader[Tensor]") -> None:
    for batch in loader:
        batch.sum()


def _stream_pass(stream: AudioStream, num_batches: int) -> None:
    for _ in range(num_batches):
        total = next(stream).fbank.sum()
    total.item()  # waits for a GPU


def _decode_pass(stream: DecodedStream, num_batches: int) -> None:
    for _ in range(num_batches):
        next(stream)


def _read_pass(source: ClipSource, iterations: Iterator[int], num_batches: int) -> None:
    for iteration in itertools.islice(iterations, num_batches):
        source(SimpleNamespace(iteration=iteration))


def _timed(read: Callable[[], None]) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of a pass."""
    cpu, wall = cpu_s(), time.perf_counter()
    read()
    wall = time.perf_counter() - wall
    # Loaders that read ahead work on for a while, as much as they had ready at the start.
    now, before = cpu_s(), cpu
    while now - before > 0.002:
        time.sleep(0.02)
        now, before = cpu_s(), now
    return now - cpu, wall


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
    parser.add_argument("--shards", action="store_true", help="read from prepared shards as well")
    parser.add_argument("--data", type=Path, help="a folder of 16 kHz mono FLAC, not synthetic")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--plot", type=Path, help="draw the results, PNG")
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch_size, args.clips) < 1 or min(args.seconds) < 0.1:
        parser.error("needs at least 1 round, 1 clip, batches of 1 clip and 0.1 seconds")
    for line in () if args.json else plain_loaders()[1]:
        print(line, flush=True)
    count = args.batch_size * math.ceil(args.clips / args.batch_size)
    device = find_device(args.device)
    results = []

    def add(paths: Sequence[Path], seconds: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kind = paths[0].suffix[1:]
            results.append(
                measure(
                    paths,
                    spec_of(seconds),
                    batch_size=args.batch_size,
                    num_threads=args.threads,
                    rounds=args.rounds,
                    seconds=seconds,
                    shards=write_shards(Path(folder), paths, kind) if args.shards else None,
                    device=device,
                )
            )
        if not args.json:
            print("\n".join(table(results[-1])), flush=True)

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
        print(json.dumps([result.as_json() for result in results]))
    if args.plot is not None:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
