"""Finds the recordings of a folder, a manifest or plain tar archives. Nothing is unpacked."""

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ssast.pipelines.audio.decode import Item, suffix
from ssast.pipelines.audio.parts import Cell, Span
from ssast.pipelines.clips.columns import PLAIN, TableFormat, say_unused
from ssast.pipelines.clips.folders import AUDIO_SUFFIXES, FFMPEG_SUFFIXES, audio_files
from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.clips.members import PACKED, read_tar, sample_key
from ssast.pipelines.clips.remote import as_os_error, changing, fetched, is_url
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ShardIndex, is_prepared
from ssast.pipelines.clips.tables import SUFFIXES, is_table
from ssast.pipelines.clips.tars import describe_left_out, find_files, names_tars
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular
from ssast.pipelines.prepare.parquet import has_sounds, parquet_rows

log = logging.getLogger(__name__)

SOUNDS = AUDIO_SUFFIXES | FFMPEG_SUFFIXES
AT_ONCE = 16  # files behind a URL that are asked for
SEGMENT_BYTES_PER_S = 96_000  # about, of 16 bit samples at 48 kHz


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording, or a segment of one, to prepare.

    Attributes:
        item: Name and data of the recording.
        signature: String that changes when the recording changes.
        num_bytes: Size in bytes; of a segment, about.
        problem: Reason why it cannot be read, if so.
        labels: Labels from the manifest.
        sample: Sample of WebDataset that it is a sound of; None outside archives.
        cell: Where it is in a Parquet file, which is then the data of ``item``.
    """

    item: Item
    signature: str
    num_bytes: int
    problem: str | None = None
    labels: tuple[str, ...] = ()
    sample: str | None = None
    cell: Cell | None = None


def find_recordings(source: Path, out: Path, table: TableFormat = PLAIN) -> list[Recording]:
    """Return the recordings of a source, sorted by name.

    Args:
        source: A folder (files and .tar archives in it and below), a manifest, .tar archives or
            Parquet files with sounds, see :func:`find_files`.
        out: A folder that is passed over.
        table: What is set of the format of a manifest.

    Raises:
        DataError: Nothing is there, it is of no such kind, or an archive is compressed.
    """
    labels: tuple[tuple[str, ...], ...] | None = None
    is_listed = False
    segments: dict[int, Segment] = {}  # by row of the manifest
    recordings: list[Recording] = []
    if is_url(source):
        return remote_recordings(source)
    if source.is_dir():
        if os.path.realpath(source) == os.path.realpath(out):
            raise DataError(f"{out}: the shards need a folder of their own, not the recordings'")
        if is_prepared(source):
            raise DataError(f"{source}: is prepared already: train on it as it is")
        base = os.path.abspath(source)

        def unreadable(error: OSError) -> None:
            name = os.path.relpath(error.filename, base)
            recordings.append(_problem(name, Path(error.filename), error.strerror or "?"))

        kinds = frozenset(
            {*SOUNDS, ".tar", ".parquet", *(suffix(f"a{packed}") for packed in PACKED)}
        )
        paths = audio_files(source, leave_out=out, suffixes=kinds, on_error=unreadable)
    elif suffix(source.name) == ".parquet" and (not source.is_file() or _has_sounds(source)):
        paths = find_files(source)
        base = os.path.commonpath([os.path.dirname(path) for path in paths])
    elif is_table(source):
        manifest = read_manifest(source, table=table)
        if isinstance(manifest.paths, ShardIndex):
            raise DataError(f"{source}: lists clips that are prepared: train on it as it is")
        clips, labels, is_listed = list(manifest.paths), manifest.labels, True
        segments = {row: clip for row, clip in enumerate(clips) if isinstance(clip, Segment)}
        paths = [clip.path if isinstance(clip, Segment) else str(clip) for clip in clips]
        base = os.path.dirname(os.path.abspath(source))
    elif names_tars(source):
        paths = find_files(source)
        base = os.path.commonpath([os.path.dirname(path) for path in paths])
    else:
        found = "this file" if source.exists() else "nothing"
        raise DataError(
            f"{source}: expected a folder, a manifest ({' '.join(SUFFIXES)}) or a .tar archive, "
            f"found {found}"
        )
    for place, path in enumerate(paths):
        name = os.path.relpath(path, base)
        if name.lower().endswith(PACKED):
            raise DataError(f"{path}: a compressed archive cannot be read in place: unpack it")
        if suffix(name) == ".tar" and labels is None:
            folder = Path(path).parents[1]
            if os.path.basename(os.path.dirname(path)) == "shards" and is_prepared(folder):
                raise DataError(f"{folder}: is prepared already: leave it out of {source}")
            say_unused(path, table)
            recordings += tar_recordings(name, Path(path))
        elif suffix(name) == ".parquet" and labels is None and _has_sounds(Path(path)):
            recordings += parquet_recordings(name, Path(path), table)
        elif suffix(name) in SOUNDS or is_listed:
            names = labels[place] if labels else ()
            recordings.append(file_recording(name, Path(path), names, segments.get(place)))
    if not recordings:
        raise DataError(f"{source}: no recordings in there")
    return sorted(recordings, key=_order)


def _order(recording: Recording) -> tuple[str, float, float]:
    segment = recording.item.segment
    span = (0.0, 0.0) if segment is None else (segment.begin_s, segment.duration_s)
    return recording.item.name, *span


def remote_recordings(source: Path) -> list[Recording]:
    """Return the recordings of a folder behind a URL; each is fetched when it is packed.

    Raises:
        DataError: There are none, the folder cannot be listed, or it is prepared already.
    """
    if is_prepared(source):
        raise DataError(f"{source}: is prepared already: train on it as it is")
    system, base = source.fs, source.path  # type: ignore[attr-defined]
    found = fetched(lambda: system.find(base, detail=True), source)

    def recording(path: str) -> Recording:
        facts, name = found[path], os.path.relpath(path, base)
        if not isinstance(facts.get("size"), int):  # lists of http have no sizes
            with contextlib.suppress(OSError):  # which is said when it is fetched
                facts = facts | as_os_error(lambda: system.info(path), path)
        signature = f"{system.ukey(path)}-{changing(facts)}"
        return Recording(Item(name, source / name), signature, facts.get("size") or 0)

    names = ((path, os.path.relpath(path, base)) for path in sorted(found))
    paths = [path for path, name in names if suffix(name) in SOUNDS and "/." not in f"/{name}"]
    with ThreadPoolExecutor(AT_ONCE, "recordings") as pool:
        recordings = list(pool.map(recording, paths))
    if not recordings:
        raise DataError(f"{source}: no recordings in there (archives must be on a disk)")
    return recordings


def tar_recordings(name: str, path: Path) -> Iterator[Recording]:
    """Yield the recordings in a plain tar archive, named ARCHIVE/MEMBER, with their labels.

    What cannot be used is yielded with its problem, see :func:`read_tar`; so is a place where no
    header stands although the archive goes on.

    Raises:
        DataError: The archive is compressed under a plain name.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            found = read_tar(path, file, status.st_size, SOUNDS)
    except OSError as error:
        yield _problem(name, path, f"cannot be read: {error.strerror}")
        return
    told = len({sound.sample for sound in found.sounds}) > 1
    for sound in found.sounds:
        item = Item(f"{name}/{sound.name}", Span(path, sound.offset, sound.size))
        signature = f"{status.st_size}-{status.st_mtime_ns}-{sound.offset}-{sound.size}"
        sample = f"{name}/{sample_key(sound.name)}" if told else None
        yield Recording(item, signature, sound.size, sound.problem, sound.labels or (), sample)
    if found.problem is not None:
        yield _problem(name, path, found.problem)
    if found.left_out:
        there = describe_left_out(found.left_out)
        log.warning("%s: left out are members that are no sounds and no labels: %s", path, there)


def _has_sounds(path: Path) -> bool:
    try:
        return has_sounds(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def parquet_recordings(name: str, path: Path, table: TableFormat) -> Iterator[Recording]:
    """Yield the recordings in a Parquet file with their labels, named FILE/ROW_NAME.

    Raises:
        DataError: It cannot be read.
    """
    try:
        status = os.stat(path)
        rows, _ = parquet_rows(path, table)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    for row, cell, size, labels in rows:
        signature = f"{status.st_size}-{status.st_mtime_ns}-{cell.group}-{cell.row}"
        yield Recording(Item(f"{name}/{row}", path), signature, size, None, labels, cell=cell)


def file_recording(
    name: str, path: Path, labels: tuple[str, ...] = (), segment: Segment | None = None
) -> Recording:
    """Return the recording in a file, with the problem if the file cannot be read.

    Args:
        name: Name of the recording.
        path: The file.
        labels: Labels of the recording.
        segment: The part of it that is wanted; None for all of it.
    """
    item = Item(name, path, segment)
    try:
        signature = item.signature()
    except OSError as error:
        return _problem(name, path, f"cannot be read: {error.strerror}", labels, segment)
    if not os.access(path, os.R_OK):
        return _problem(name, path, "cannot be read: Permission denied", labels, segment)
    num_bytes = int(signature.partition("-")[0])
    if segment is not None:
        num_bytes = math.ceil(min(num_bytes, segment.duration_s * SEGMENT_BYTES_PER_S))
    return Recording(item, signature, num_bytes, None, labels)


def _problem(
    name: str,
    path: Path,
    problem: str,
    labels: tuple[str, ...] = (),
    segment: Segment | None = None,
) -> Recording:
    return Recording(Item(name, path, segment), problem, 0, problem, labels)


def with_unique_names(recordings: Iterable[Recording]) -> list[Recording]:
    """Number the later ones of equal names: an archive may hold several members of one name."""
    counts: Counter[str] = Counter()
    found = []
    for recording in recordings:
        name = recording.item.full_name
        counts[name] += 1
        if counts[name] > 1:
            item = replace(recording.item, name=f"{recording.item.name}#{counts[name]}")
            recording = replace(recording, item=item)
        found.append(recording)
    return found
