"""Measure the start of a run: opening a list of clips, hold-out, fingerprint, order, leakage check.

The lists are made up and no clip is read, so millions of clips take no space. Every rank is a
process; all of them start at once, as in training. Memory is that of the machine: the largest that
the ranks held for themselves, summed, and what they share (files mapped into memory, counted once).
The leakage check compares two sets of files of equal size that differ in the middle.
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
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

KINDS = ("shards", "json", "csv", "folder")
STAGES = ("open", "hold out", "fingerprint", "order")
MIB = 2**20
VALID_SHARE = 0.02
OLD = (1, 1)  # times of files, in s: one that has just been written is not trusted
FILE_BYTES = 320_044  # 10 s of 16 kHz and 16 bits, as WAV


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
    # In no order.
    names = (f"{row * 2654435761 % 2**32:08x}/Y{row:010d}_000030" for row in range(clips))
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
    os.utime(path, OLD)
    return path


def _write_index(folder: Path, clips: int) -> None:
    """Write index and recordings of a prepared folder, without its shards."""
    (folder / "shards").mkdir()
    rows = np.arange(clips, dtype=np.int64)
    size = 150_000 + rows * 7919 % 50_000
    index = np.stack([rows // 4096, rows % 4096 * 204_800 + 512, size], 1)
    np.save(folder / "index.npy", index)
    np.save(folder / "recordings.npy", rows // 3)
    for name in ("index.npy", "recordings.npy"):
        os.utime(folder / name, OLD)
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
    from ssast.pipelines.clips.holdout import split_clips
    from ssast.pipelines.clips.manifest import read_clips
    from ssast.pipelines.clips.mix import fingerprint, select
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
    clips = read_clips(source)
    times.append(time.perf_counter())
    train, valid = (select(clips, rows) for rows in split_clips(clips, VALID_SHARE))
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


def compare_files(folder: Path, count: int) -> Iterator[str]:
    """Compare two sets of so many files; yield a line for the first and for a later start."""
    from ssast.pipelines.clips.overlap import Contents

    sets: list[list[str]] = [[], []]
    for row in range(2 * count):
        path = folder / str(row // 1000) / f"{row}.wav"
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:  # takes no more than a block on a disk
            file.seek(FILE_BYTES // 2)
            file.write(row.to_bytes(8, "little"))
            file.truncate(FILE_BYTES)
        os.utime(path, OLD)
        sets[row // count].append(str(path))
    for what in ("first", "later"):
        contents, begun, cpu = Contents(), time.perf_counter(), time.process_time()
        assert not contents.copies(*sets)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        yield (
            f"leakage check of 2 x {count:,} files, {what} start: {seconds:.1f} s, "
            f"{cpu:.1f} CPU s, {contents.num_read:,} read, {contents.bytes_read / 1e6:,.1f} MB of "
            f"{2 * count * FILE_BYTES / 1e6:,.0f} MB; a million files: "
            f"{cpu / 2 / count * 1e6:.0f} CPU s, {contents.bytes_read / 2 / count / 1e3:.1f} GB"
        )


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
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clips", type=int, default=2_000_000, help="clips of each list")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--files", type=int, default=10_000, help="of each set to compare")
    parser.add_argument("--folder", type=Path, help="folder for the lists; a temporary one")
    options = parser.parse_args(arguments)
    starts = []
    for kind in options.kinds:
        with _folder(options.folder) as folder:
            source = write_list(folder, kind, options.clips)
            starts += [measure(source, options.ranks, what) for what in ("first", "later")]
    print(*table(starts), sep="\n")
    if options.files:
        with _folder(options.folder) as folder:
            print(*compare_files(folder, options.files), sep="\n")


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    """Make a folder, and an empty cache beside it."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        before = os.environ.get("SSAST_CACHE")
        os.environ["SSAST_CACHE"] = f"{folder}/cache"
        (Path(folder) / "list").mkdir()
        try:
            yield Path(folder) / "list"
        finally:
            del os.environ["SSAST_CACHE"]
            if before is not None:
                os.environ["SSAST_CACHE"] = before


if __name__ == "__main__":
    main()
