"""Checks a whole data set before it is trained on: every byte, every clip, every label."""

import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.audio.convert import SampleDigest
from ssast.pipelines.audio.decode import Item, length_note, sndfile_blocks, to_mono
from ssast.pipelines.audio.encoded import LOUDEST, read_clip
from ssast.pipelines.audio.ffmpeg import BLOCK_SAMPLES
from ssast.pipelines.audio.sndfile import open_sound
from ssast.pipelines.clips.columns import PLAIN, TableFormat
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.remote import as_path
from ssast.pipelines.clips.shards import (
    INDEX,
    REPORT,
    SHARD,
    SIDECAR,
    ClipPath,
    ShardClip,
    ShardIndex,
    header_problem,
)
from ssast.pipelines.clips.sidecar import BLOCK, Sidecar, read_small
from ssast.pipelines.cores import usable_cores
from ssast.pipelines.datasets.tables import lines, table
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.files import open_regular, write_atomically
from ssast.pipelines.text import parse_json, shows_progress

AT_ONCE = 64  # files of a manifest that one thread takes


@dataclass(frozen=True)
class Problem:
    """A problem of a data set.

    Attributes:
        where: Name of the clip or file.
        problem: Description of the problem.
    """

    where: str
    problem: str


@dataclass
class Checked:
    """The result of a check.

    Attributes:
        num_clips: Clips that were looked at.
        seconds: Length of those that are good.
        labels: All different labels.
        problems: Problems, in the order of the clips.
        wrong_lengths: Files whose headers state another length than they have: read to their ends.
    """

    num_clips: int = 0
    seconds: float = 0.0
    labels: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    wrong_lengths: list[Problem] = field(default_factory=list)


def check_data(
    path: str | Path,
    *,
    classes: Path | None = None,
    table: TableFormat = PLAIN,
    report: Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Checked:
    """Check prepared shards, a manifest or a folder of audio files.

    Of shards: the index, the sidecars and the headers and bytes of the archives agree, and each
    clip decodes to the samples it was made of. Of some clips of a prepared folder: the same of the
    shards that hold them. Of files: each decodes to its end, to sound that training can use.

    Args:
        path: Data set, as ``data.train`` takes it.
        classes: A CSV of the known labels, with a column ``mid``; by default ``labels.csv`` beside
            the manifest or in the folder, if there is one.
        table: What is set of the format of a manifest.
        report: Gets all problems, and wrong lengths as notes, as lines of JSON.
        jobs: Threads; the usable cores by default.
        progress: Show a progress bar on stderr, if that is a terminal.

    Raises:
        DataError: The list of clips itself, or that of the labels, cannot be read.
    """
    if jobs is not None and jobs < 1:
        raise DataError(f"--jobs is {jobs}, expected at least 1")
    path = as_path(path)
    known = known_labels(path, classes)
    manifest = read_manifest(path, known, table)
    paths = manifest.paths
    if isinstance(paths, ShardIndex):
        numbers = shard_numbers(paths)
        rows = rows_by_shard(paths, numbers)
        tasks = [(lambda n=n: check_shard(paths, n, rows[n], manifest.labels)) for n in numbers]
        overall = [] if paths.rows is not None else check_index(paths)
    else:
        starts = range(0, len(paths), AT_ONCE)
        tasks = [(lambda at=at: check_files(paths[at : at + AT_ONCE])) for at in starts]
        overall = []
    result = Checked(problems=overall)
    for part in parallel(tasks, len(paths), jobs or usable_cores(), progress):
        result.num_clips += part.num_clips
        result.seconds += part.seconds
        result.problems += part.problems
        result.wrong_lengths += part.wrong_lengths
    for clip, names in zip(paths, manifest.labels or (), strict=False):
        result.labels.update(names)
        if known is not None:
            unknown = ", ".join(repr(name) for name in names if name not in known)
            if unknown:
                result.problems.append(Problem(str(clip), f"unknown label {unknown}"))
    if report is not None:
        lines = [{"where": p.where, "problem": p.problem} for p in result.problems]
        lines += [{"where": p.where, "note": p.problem} for p in result.wrong_lengths]
        write_atomically(report, "".join(f"{json.dumps(line)}\n" for line in lines))
    return result


def parallel(
    tasks: Sequence[Callable[[], Checked]], total: int, jobs: int, progress: bool
) -> Iterator[Checked]:
    """Run tasks in threads and yield their results in order, with a progress bar."""
    stop = threading.Event()

    def run(task: Callable[[], Checked]) -> Checked:
        return Checked() if stop.is_set() else task()

    with (
        tqdm(total=total, desc="check", unit=" clips", disable=not shows_progress(progress)) as bar,
        ThreadPoolExecutor(jobs, "check") as pool,
    ):
        try:
            futures = [pool.submit(run, task) for task in tasks]
            for future in as_completed(futures):
                bar.update(future.result().num_clips)
        finally:
            stop.set()
    yield from (future.result() for future in futures)


def known_labels(path: Path, classes: Path | None) -> set[str] | None:
    """Read the labels that may occur; None if there is no list of them.

    Raises:
        DataError: The list cannot be read.
    """
    if classes is None:
        classes = (path if path.is_dir() else path.parent) / "labels.csv"
        header = next(lines(classes), ("", ""))[1] if classes.exists() else ""
        if "mid" not in map(str.strip, header.split(",")):
            return None  # none, or a list of clips of the same name
    return {row["mid"] for _, row in table(classes, ["mid"])}


def check_files(paths: Sequence[ClipPath]) -> Checked:
    """Decode files to their ends."""
    result = Checked(len(paths))
    for path in paths:
        try:
            read_clip(path, FbankSpec())  # what training will say of it, decoded or not
            item = Item.of(path)
            result.seconds += usable_seconds(item)
        except (DataError, UnusableError) as error:
            result.problems.append(Problem(str(path), str(error)))
            continue
        lengths = length_note(item)
        if lengths is None:
            continue
        stated_s, found_s = lengths["stated_s"], lengths["found_s"]
        if item.segment is None:
            why = f"its header states {stated_s:g} s, it holds {found_s:g} s"
            result.wrong_lengths.append(Problem(str(path), why))
        else:
            beyond = f"{stated_s - found_s:.2f} s beyond the end of the recording"
            result.problems.append(Problem(str(path), f"reaches {beyond}: clipped"))
    return result


def usable_seconds(item: Item) -> float:
    """Decode a clip to its end and return its length in s.

    Raises:
        DataError: Training cannot use it, for this reason.
        UnusableError: It cannot be decoded to its end.
    """
    seconds = 0.0
    for block, rate_hz in to_mono(sndfile_blocks(item)):
        seconds += len(block) / rate_hz
        if np.abs(block).max() >= LOUDEST:
            raise DataError("holds samples that are NaN, infinite or absurdly large")
    return seconds


def shard_numbers(index: ShardIndex) -> list[int]:
    """Return the shards on disk or in the index; of a subset, those that hold its clips."""
    if index.rows is not None:
        return np.unique(index.table()[:, 0]).tolist()
    there = {
        int(path.stem)
        for path in (index.folder / SHARD).parent.iterdir()
        if path.suffix in (".tar", ".jsonl") and path.stem.isdigit()
    }
    return sorted(there | set(np.unique(index.table()[:, 0]).tolist()))


def rows_by_shard(index: ShardIndex, numbers: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the rows of the index that lie in each shard."""
    shards = index.table()[:, 0]
    order = np.argsort(shards, kind="stable")
    ends = np.searchsorted(shards[order], numbers, side="right")
    starts = np.searchsorted(shards[order], numbers, side="left")
    return {n: order[a:b] for n, a, b in zip(numbers, starts, ends, strict=True)}


def check_index(index: ShardIndex) -> list[Problem]:
    """Check the order of the index's rows, and their number against the report."""
    where = str(index.folder / INDEX)
    problems = []
    table = index.table()
    step = np.diff(table[:, :2], axis=0)
    if not ((step[:, 0] > 0) | ((step[:, 0] == 0) & (step[:, 1] > 0))).all():
        problems.append(Problem(where, "its rows are not in order, or one is there twice"))
    try:
        index.recordings()
        reported = parse_json(read_small(index.folder / REPORT))["clips"]
        if reported != len(index):
            problems.append(Problem(where, f"has {len(index)} rows, {REPORT} says {reported}"))
    except DataError as error:
        problems.append(Problem(where, str(error)))
    except (OSError, ValueError, KeyError, TypeError):
        problems.append(Problem(str(index.folder / REPORT), "damaged: prepare the data again"))
    return problems


def check_shard(
    index: ShardIndex,
    number: int,
    rows: np.ndarray,
    labels: tuple[tuple[str, ...], ...] | None,
) -> Checked:
    """Check a shard against its sidecar and the index, and decodes all of its clips.

    Args:
        index: Index of the clips.
        number: Number of the shard.
        rows: [n] rows of the index that lie in it.
        labels: Labels of all clips.
    """
    path = index.folder / SHARD.format(number)
    result = Checked(len(rows))
    try:
        sidecar = Sidecar.read(index.folder / SIDECAR.format(number))
        size = path.stat().st_size
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        name = getattr(error, "filename", None) or path
        result.problems.append(Problem(str(name), f"cannot be checked: {why}"))
        return result
    listed = {(clip["offset"], clip["size"]): clip for clip in sidecar.clips}
    place = 0
    wanted = None if index.rows is None else {index[int(row)].offset for row in rows}
    for clip in sidecar.clips:
        shard_clip = ShardClip(str(path), clip["offset"], clip["size"])
        where = f"{path}: {clip['file']}"
        try:
            if clip["offset"] != place + BLOCK:
                raise DataError(f"listed at byte {clip['offset']}, expected {place + BLOCK}")
            if wanted is None or clip["offset"] in wanted:
                result.seconds += decoded_seconds(shard_clip, clip)
        except OSError as error:
            result.problems.append(Problem(where, f"cannot be read: {error.strerror}"))
        except DataError as error:
            result.problems.append(Problem(where, str(error).removeprefix(f"{where}: ")))
        place = clip["offset"] + clip["size"] + -clip["size"] % BLOCK
    expected = place + 2 * BLOCK
    if not size == sidecar.size == expected:
        why = f"{size} bytes, expected {expected} by its clips and {sidecar.size} by its sidecar"
        result.problems.append(Problem(str(path), why))
    in_index = set()
    for row in rows:
        shard_clip = index[int(row)]
        key = (shard_clip.offset, shard_clip.size)
        in_index.add(key)
        where = f"{index.folder / INDEX}: row {row}"
        if key not in listed:
            why = f"{key[1]} bytes at {key[0]} are no clip of {path}"
            result.problems.append(Problem(where, why))
        elif wanted is not None:  # a manifest has labels of its own
            continue
        elif tuple(listed[key].get("labels", ())) != (labels[row] if labels else ()):
            result.problems.append(Problem(where, f"{shard_clip}: other labels than in the shard"))
    left_out = len(listed) - len(in_index & listed.keys())
    if left_out and wanted is None and not drops_duplicates(index.folder):
        why = f"{left_out} of its clips are not in {INDEX}"
        result.problems.append(Problem(str(path), why))
    return result


def drops_duplicates(folder: Path) -> bool:
    """Return whether the index leaves out duplicates."""
    try:
        settings = parse_json(read_small(folder / REPORT))["settings"]
        return bool(settings["drop_duplicates"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def decoded_seconds(clip: ShardClip, expected: dict) -> float:
    """Decode a clip in a shard.

    Args:
        clip: The clip.
        expected: Its line of the sidecar.

    Returns:
        Its length in seconds.

    Raises:
        OSError: The shard cannot be read.
        DataError: It is not what it was when it was prepared.
    """
    problem = header_problem(clip, expected["file"])
    if problem is not None:
        raise DataError(problem)
    try:
        with open_sound(io.BytesIO(clip.read())) as sound:
            num_samples, digest = 0, SampleDigest()
            dtype = "float32" if sound.subtype == "FLOAT" else "int16"
            for block in sound.blocks(BLOCK_SAMPLES // sound.channels, dtype=dtype):
                num_samples += len(block)
                digest.add(block)
            rate_hz, channels = sound.samplerate, sound.channels
    except (RuntimeError, ValueError) as error:
        why = getattr(error, "error_string", None) or str(error)
        raise DataError(f"cannot be decoded: {' '.join(why.split()).rstrip('.')}") from error
    if channels != 1 or digest.text() != expected["digest"]:
        raise DataError("decodes to other samples than were packed")
    return num_samples / rate_hz


def is_report(path: Path) -> bool:
    """Return whether a file is the report of an earlier check, which a new one may replace."""
    try:
        with open_regular(path) as file:
            lines = file.read().decode().splitlines()
        keys = ({"where", "problem"}, {"where", "note"})
        return all(set(parse_json(line)) in keys for line in lines)
    except (OSError, ValueError, TypeError):
        return False
