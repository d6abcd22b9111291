"""Measure the start of a run: opening a list of clips, holding out, fingerprints, first order.

The lists are made up and no clip is read, so millions of clips take no space. Every rank is a
process; all of them start at once, as in training. Memory is that of the machine: what the
ranks hold for themselves, and what they share (files mapped into memory, counted once).
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from ssast.pipelines.clips.shared import SETTLED_S

KINDS = ("shards", "json", "csv", "folder")
STAGES = ("open", "hold out", "fingerprint", "order")
MIB = 2**20


@dataclass(frozen=True)
class Start:
    """Times and memory of a start.

    Attributes:
        kind: Form of the list.
        clips: Number of clips.
        ranks: Number of processes.
        what: "first" start, or a "later" one, for which the lists are prepared already.
        seconds: Wall-clock time in s of each stage, of the slowest rank.
        cpu_s: CPU time in s of all ranks.
        private_mib: Largest memory in MiB that a rank held for itself, summed over ranks.
        shared_mib: Memory in MiB of mapped files.
    """

    kind: str
    clips: int
    ranks: int
    what: str
    seconds: dict[str, float]
    cpu_s: float
    private_mib: float
    shared_mib: float


def write_list(folder: Path, kind: str, clips: int) -> Path:
    """Write a list of clips that do not exist (of a folder: empty files).

    Args:
        folder: Folder for it; it exists.
        kind: One of :data:`KINDS`.
        clips: Number of clips.

    Returns:
        What ``data.train`` would name.
    """
    names = (
        f"{row * 2654435761 % 2**32:08x}/Y{row:010d}_000030" for row in range(clips)
    )  # in no order
    labels = (f"/m/0{row % 500:03d},/m/0{row % 7:03d}" for row in range(clips))
    if kind == "shards":
        _write_index(folder, clips)
        return folder
    if kind == "folder":
        for row, name in enumerate(names):
            path = folder / str(row // 1000) / f"{name[9:]}.flac"
            if row % 1000 == 0:
                path.parent.mkdir()
            path.touch()
        return folder
    path = folder / f"clips.{kind}"
    with open(path, "w", encoding="utf-8") as file:
        if kind == "csv":
            file.write("wav,labels\n")
            file.writelines(
                f'audio/{name}.flac,"{names}"\n' for name, names in zip(names, labels, strict=True)
            )
        else:
            entries = (
                json.dumps({"wav": f"audio/{name}.flac", "labels": names})
                for name, names in zip(names, labels, strict=True)
            )
            file.write('{"data": [\n' + next(entries))
            file.writelines(f",\n{entry}" for entry in entries)
            file.write("\n]}\n")
    return path


def _write_index(folder: Path, clips: int) -> None:
    """Write index, recordings and labels of a prepared folder, without its shards."""
    (folder / "shards").mkdir()
    rows = np.arange(clips, dtype=np.int64)
    size = 150_000 + rows * 7919 % 50_000
    index = np.stack([rows // 4096, rows % 4096 * 204_800 + 512, size], 1)
    np.save(folder / "index.npy", index)
    np.save(folder / "recordings.npy", rows // 3)
    names = [f"class {number}" for number in range(500)]
    with open(folder / "labels.json", "w", encoding="utf-8") as file:
        file.write(f'{{"names": {json.dumps(names)}, "clips": [[0]')
        file.writelines(f", [{row % 500}, {row % 7}]" for row in range(1, clips))
        file.write("]}")
    settings = {"recipe": {"hop_s": None, "clip_s": 10.0}, "drop_duplicates": False}
    report = {"clips": clips, "duplicates": 0, "settings": settings}
    (folder / "report.json").write_text(json.dumps(report))


def measure(source: Path, ranks: int, what: str) -> Start:
    """Start so many ranks on a list of clips."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(ranks)
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [
        context.Process(target=_rank, args=(str(source), barrier, theirs)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    found = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    kind = source.suffix[1:] or ("shards" if (source / "shards").exists() else "folder")
    seconds = {stage: max(rank["seconds"][stage] for rank in found) for stage in STAGES}
    return Start(
        kind,
        found[0]["clips"],
        ranks,
        what,
        seconds,
        sum(rank["cpu_s"] for rank in found),
        sum(rank["private"] for rank in found) / MIB,
        sum(rank["shared"] for rank in found) / MIB,
    )


def _rank(source: str, barrier: threading.Barrier, pipe: Connection) -> None:
    """Do what a rank does before training begins, and send what it took."""
    from ssast.engine.config import Config
    from ssast.engine.data.clips import find_clips
    from ssast.engine.settings import Data
    from ssast.pipelines.clips.manifest import read_clips
    from ssast.pipelines.clips.mix import fingerprint
    from ssast.pipelines.clips.order import clips_at

    before = _memory("status", "RssAnon")
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _memory("status", "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    barrier.wait()
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    times = [time.perf_counter()]
    read_clips(source)
    times.append(time.perf_counter())
    train, valid = find_clips(Config(data=Data(train=source)))
    times.append(time.perf_counter())
    fingerprint(train), fingerprint(valid)
    times.append(time.perf_counter())
    clips_at(np.arange(64), len(train), 0)
    times.append(time.perf_counter())
    after = resource.getrusage(resource.RUSAGE_SELF)
    done.set()
    watcher.join()
    barrier.wait()
    seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    shared = _memory("smaps_rollup", "Pss_File") + _memory("smaps_rollup", "Pss_Shmem")
    barrier.wait()
    pipe.send(
        {
            "clips": len(train) + len(valid),
            "seconds": seconds,
            "cpu_s": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime,
            "private": peak - before,
            "shared": shared,
        }
    )


def _memory(file: str, key: str) -> int:
    """Return a number of bytes of this process out of /proc."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def table(starts: list[Start]) -> Iterator[str]:
    """Format starts as the lines of a Markdown table."""
    yield "| list | clips | ranks | start | seconds | " + " | ".join(STAGES) + " | CPU s | MiB |"
    yield "| :-- |" + " --: |" * 2 + " :-- |" + " --: |" * (len(STAGES) + 3)
    for s in starts:
        stages = " | ".join(f"{s.seconds[stage]:.1f}" for stage in STAGES)
        memory = f"{s.private_mib:,.0f} + {s.shared_mib:,.0f}"
        yield (
            f"| {s.kind} | {s.clips:,} | {s.ranks} | {s.what} | {sum(s.seconds.values()):.1f} | "
            f"{stages} | {s.cpu_s:.1f} | {memory} |"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="ssast bench lists", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clips", type=int, default=2_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder for the lists; a temporary one")
    options = parser.parse_args(arguments)
    starts = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            os.environ["SSAST_CACHE"] = f"{folder}/cache"
            (Path(folder) / "list").mkdir()
            source = write_list(Path(folder) / "list", kind, options.clips)
            time.sleep(2 * SETTLED_S)  # a file that has just been written is not trusted
            starts += [measure(source, options.ranks, what) for what in ("first", "later")]
    print(*table(starts), sep="\n")


if __name__ == "__main__":
    main()
