"""What two sets of clips have in common: recordings, and copies of clips."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np

from ssast.pipelines.clips.digests import DigestCache
from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import (
    ClipPath,
    ClipPaths,
    ShardClip,
    ShardIndex,
)
from ssast.pipelines.clips.shared import SETTLED_S
from ssast.pipelines.errors import DataError

MIDDLE_BYTES = 4096  # that tell most files of equal size apart
AT_ONCE = 4096  # files that are looked at or read between two writes of the cache
THREADS = 8  # they wait for the disk or the network most of the time

Pairs = list[tuple[ClipPath, ClipPath]]


def shared_recordings(one: ClipPaths, other: ClipPaths) -> Pairs:
    """Return a clip of each set for every recording that both have clips of; no clip is read.

    Recordings are the same if they have the same number in the same prepared folder, or if they are
    files of the same path.

    Raises:
        DataError: The list of the recordings of a prepared folder cannot be read.
    """
    if isinstance(one, ShardIndex) and isinstance(other, ShardIndex):
        if not _same_folder(one, other):
            return []
        _, ours, theirs = np.intersect1d(one.recordings(), other.recordings(), return_indices=True)
        return [(one[a], other[b]) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    if isinstance(one, ShardIndex) or isinstance(other, ShardIndex):
        return []
    if len(one) < len(other):  # the names of the smaller set are held in memory
        names = set(_files(one))
        names = {name for name in _files(other) if name in names}
    else:
        names = set(_files(other))
    if not names:
        return []
    if not _has_segments(one) and not _has_segments(other):
        return [(clip, clip) for clip in one if str(clip) in names]
    first, second = _first_clips(one, names), _first_clips(other, names)
    return [(clip, second[name]) for name, clip in first.items() if name in second]


def _first_clips(clips: ClipPaths, names: set[str]) -> dict[str, ClipPath]:
    """Return the first clip of each of these files."""
    found: dict[str, ClipPath] = {}
    for name, clip in zip(_files(clips), clips, strict=True):
        if name in names:
            found.setdefault(name, clip)
    return found


def _files(clips: ClipPaths) -> Iterable[str]:
    """Return the path of each clip's file; those of clips in shards stand for themselves."""
    if isinstance(clips, FileList):
        return clips.files()
    return (clip.path if isinstance(clip, Segment) else str(clip) for clip in clips)


def _whole(clips: ClipPaths) -> ClipPaths:
    """Return the recordings of segments, each once; the same clips where there are none."""
    if not _has_segments(clips):
        return clips
    if isinstance(clips, FileList):
        return clips.recordings()
    return list(dict.fromkeys(_files(clips)))


def _has_segments(clips: ClipPaths) -> bool:
    if isinstance(clips, FileList):
        return clips.has_segments
    return not isinstance(clips, ShardIndex) and any(isinstance(clip, Segment) for clip in clips)


class Contents:
    """What clips hold, as far as it must be known to compare them: each file is read once at most.

    Only clips of equal size are read, first a few bytes from the middle of each, and only those
    that are equal there to their ends. Digests are kept for later processes.

    Args:
        tick: Called often while files are looked at and read.
    """

    def __init__(self, tick: Callable[[], None] = lambda: None) -> None:
        self._tick = tick
        self._sets: dict[int, _Files] = {}  # by id; a set that is kept keeps its id
        self._whole: dict[int, tuple[ClipPaths, ClipPaths]] = {}
        self._samples: dict[int, tuple[ShardIndex, list[str]]] = {}
        self._cache: DigestCache | None = None
        self.num_known = self.num_read = self.bytes_read = 0

    def sizes(self, clips: ClipPaths) -> np.ndarray:
        """Return the bytes of each clip's file, -1 for one that is missing, [n] int64."""
        return self._files(clips).sizes

    def copies(self, one: ClipPaths, other: ClipPaths) -> Pairs:
        """Return pairs of clips, of one set and of another, that hold the same.

        Prepared clips hold the same if their samples are equal, whatever the folder and the codec:
        the sidecars of the shards say so. Any other clips must be equal byte for byte. So neither a
        recording that was prepared twice with clips of another length, nor a prepared clip and the
        file that it was made from, are copies. Of segments, their recordings are compared.

        Raises:
            DataError: A sidecar cannot be read.
        """
        if isinstance(one, ShardIndex) and isinstance(other, ShardIndex):
            if _same_folder(one, other) and one.without_duplicates():
                return []
            ours, theirs = self._sample_digests(one), self._sample_digests(other)
            clip_of = {digest: clip for digest, clip in zip(ours, one, strict=True)}
            pairs = zip(theirs, other, strict=True)
            return [(clip_of[digest], clip) for digest, clip in pairs if digest in clip_of]
        one, other = self._recordings(one), self._recordings(other)
        sets = self._files(one), self._files(other)
        rows = _equal([found.sizes for found in sets])
        rows = tuple(part[found.sizes[part] > 0] for found, part in zip(sets, rows, strict=True))
        for kind in ("middle", "whole"):
            digests = []
            for found, part in zip(sets, rows, strict=True):
                self._read(found, part, kind)
                digests.append(found.digests[kind][part])
            known = [values.any(1) for values in digests]
            names = [d[k].view("S16").reshape(-1) for d, k in zip(digests, known, strict=True)]
            rows = tuple(part[k] for part, k in zip(rows, known, strict=True))
            rows = tuple(part[at] for part, at in zip(rows, _equal(names), strict=True))
        row_of = {sets[0].digests["whole"][row].tobytes(): int(row) for row in rows[0]}
        return [
            (one[row_of[sets[1].digests["whole"][row].tobytes()]], other[int(row)])
            for row in rows[1]
        ]

    def repeats(self, clips: ClipPaths) -> list[list[ClipPath]]:
        """Return groups of clips of one set that hold the same, as :meth:`copies` compares them.

        Raises:
            DataError: A sidecar cannot be read.
        """
        if isinstance(clips, ShardIndex):
            return _groups(np.array(self._sample_digests(clips)), clips)
        clips = self._recordings(clips)
        files = self._files(clips)
        rows = np.flatnonzero(files.sizes > 0)
        rows = rows[_repeated(files.sizes[rows])]
        for kind in ("middle", "whole"):
            self._read(files, rows, kind)
            rows = rows[files.digests[kind][rows].any(1)]
            rows = rows[_repeated(files.digests[kind][rows].view("S16").reshape(-1))]
        names = files.digests["whole"][rows].view("S16").reshape(-1)
        return _groups(names, [clips[int(row)] for row in rows])

    def summary(self) -> str:
        """Return what was read so far, and what was known already; empty if it is nothing."""
        if not self.num_read + self.num_known:
            return ""
        return (
            f"leakage check: {self.num_read} digests of files of equal size from "
            f"{self.bytes_read / 1e6:.1f} MB, {self.num_known} known from before"
        )

    def _recordings(self, clips: ClipPaths) -> ClipPaths:
        if id(clips) not in self._whole:
            self._whole[id(clips)] = clips, _whole(clips)  # clips that are kept keep their id
        return self._whole[id(clips)][1]

    def _sample_digests(self, index: ShardIndex) -> list[str]:
        if id(index) not in self._samples:
            digests = [""] * len(index)
            for row, line in index.sidecar_lines():
                digests[row] = line["digest"]
            self._samples[id(index)] = index, digests  # an index that is kept keeps its id
        return self._samples[id(index)][1]

    def _files(self, clips: ClipPaths) -> "_Files":
        if id(clips) not in self._sets:
            self._sets[id(clips)] = _Files(clips, self._tick)
        return self._sets[id(clips)]

    def _read(self, files: "_Files", rows: np.ndarray, kind: str) -> None:
        """Compute the digests of some clips that are not known yet."""
        rows = rows[~files.done[kind][rows]]
        if not len(rows):
            return
        if self._cache is None:
            self._cache = DigestCache()
        files.done[kind][rows] = True
        keys = files.keys(rows, kind)
        files.digests[kind][rows], known = self._cache.find(keys)
        self.num_known += int(known.sum())
        rows, keys = rows[~known], keys[~known]
        digest = partial(_digest, kind=kind)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="ssast-hash") as threads:
            for start in range(0, len(rows), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                clips = [files.clips[int(row)] for row in rows[part]]
                for row, found in zip(rows[part], threads.map(digest, clips), strict=True):
                    files.digests[kind][row], size = found
                    self.num_read, self.bytes_read = self.num_read + 1, self.bytes_read + size
                    self._tick()
                digests = files.digests[kind][rows[part]]
                kept = files.settled[rows[part]] & digests.any(1)
                self._cache.add(keys[part][kept], digests[kept])


class _Files:
    """The clips of a set with sizes and digests, 0 for those that cannot be read."""

    def __init__(self, clips: ClipPaths, tick: Callable[[], None]) -> None:
        self.clips = clips
        self.sizes = np.full(len(clips), -1)
        self.times, self.inodes = np.zeros_like(self.sizes), np.zeros_like(self.sizes)
        self.digests = {kind: np.zeros((len(clips), 2), "u8") for kind in ("middle", "whole")}
        self.done = {kind: np.zeros(len(clips), bool) for kind in ("middle", "whole")}
        status_of_shard = lru_cache(maxsize=4096)(os.stat)

        def look(start: int) -> np.ndarray:
            found = np.full((min(AT_ONCE, len(clips) - start), 3), -1)
            for row, clip in enumerate(clips[start : start + AT_ONCE]):
                with contextlib.suppress(OSError):
                    if not isinstance(clip, ShardClip):
                        status = os.stat(clip.path if isinstance(clip, Segment) else clip)
                        found[row] = status.st_size, status.st_mtime_ns, _signed(status.st_ino)
                    elif is_url(clip.path):
                        found[row] = clip.size, 0, 0
                    else:
                        status = status_of_shard(clip.path)
                        found[row] = clip.size, status.st_mtime_ns, _signed(status.st_ino)
            return found

        with ThreadPoolExecutor(THREADS, thread_name_prefix="ssast-stat") as threads:
            starts = range(0, len(clips), AT_ONCE)
            for start, found in zip(starts, threads.map(look, starts), strict=True):
                part = slice(start, start + AT_ONCE)
                self.sizes[part], self.times[part], self.inodes[part] = found.T
                tick()
        # One that has just been changed may change again without another time.
        self.settled = (self.times > 0) & (self.times < 1e9 * (time.time() - SETTLED_S))

    def keys(self, rows: np.ndarray, kind: str) -> np.ndarray:
        """Return what changes with a clip, [n, 2] uint64."""
        found = bytearray()
        values = zip(*(part[rows].tolist() for part in (self.times, self.inodes)), strict=True)
        for row, (changed, inode) in zip(rows.tolist(), values, strict=True):
            clip = self.clips[row]
            where = (clip.path, clip.offset) if isinstance(clip, ShardClip) else str(clip)
            about = ascii((where, int(self.sizes[row]), changed, inode, kind))
            found += hashlib.blake2b(about.encode(), digest_size=16).digest()
        return np.frombuffer(found, "u8").reshape(-1, 2)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _equal(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the values that both arrays have."""
    one, other = values
    return np.flatnonzero(np.isin(one, other)), np.flatnonzero(np.isin(other, one))


def _digest(clip: ClipPath, kind: str) -> tuple[np.ndarray, int]:
    """Return the digest of a clip or of its middle, [2] uint64, 0 if unreadable; and bytes read."""
    digest, size = hashlib.sha256(), 0
    try:
        if isinstance(clip, ShardClip):
            data = clip.read()
            start = max(0, (len(data) - MIDDLE_BYTES) // 2) if kind == "middle" else 0
            end = start + MIDDLE_BYTES if kind == "middle" else len(data)
            digest.update(data[start:end])
            size = len(data)
        else:
            assert not isinstance(clip, Segment), "the recordings of segments are compared"
            with open(clip, "rb", buffering=0) as file:
                left = os.fstat(file.fileno()).st_size
                if kind == "middle":
                    file.seek(max(0, (left - MIDDLE_BYTES) // 2))
                    left = MIDDLE_BYTES
                while left > 0 and (block := file.read(min(left, 2**20))):
                    digest.update(block)
                    size, left = size + len(block), left - len(block)
    except (OSError, DataError):
        return np.zeros(2, "u8"), size  # the pipeline names it when it comes up
    return np.frombuffer(digest.digest()[:16], "u8"), size


def _same_folder(one: ShardIndex, other: ShardIndex) -> bool:
    folders = [
        str(index.folder) if is_url(index.folder) else os.path.realpath(index.folder)
        for index in (one, other)
    ]
    return folders[0] == folders[1]


def _repeated(values: np.ndarray) -> np.ndarray:
    """Return which values are there more than once, [n] bool."""
    _, number, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[number.reshape(-1)] > 1


def _groups(names: np.ndarray, clips: ClipPaths) -> list[list[ClipPath]]:
    """Return the clips that share a name with another one, together."""
    groups: dict[bytes | str, list[ClipPath]] = {}
    for row in np.flatnonzero(_repeated(names)).tolist():
        groups.setdefault(names[row], []).append(clips[row])
    return list(groups.values())
