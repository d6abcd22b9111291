"""What two sets of clips have in common: recordings, and copies of clips."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.shards import (
    ClipPath,
    ClipPaths,
    ShardClip,
    ShardIndex,
)
from ssast.pipelines.errors import DataError

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
    names = set(map(str, other))
    return [(clip, clip) for clip in one if str(clip) in names]


class Contents:
    """Digests of clips, which are kept: each clip is read once at most."""

    def __init__(self) -> None:
        self._bytes: dict[ClipPath, str | None] = {}
        self._samples: dict[int, tuple[ShardIndex, list[str]]] = {}  # by id of the index

    def copies(self, one: ClipPaths, other: ClipPaths) -> Pairs:
        """Return pairs of clips, of one set and of another, that hold the same.

        Prepared clips hold the same if their samples are equal, whatever the folder and the codec:
        the sidecars of the shards say so. Any other clips must be equal byte for byte, and only
        those of equal size are read. So neither a recording that was prepared twice with clips of
        another length, nor a prepared clip and the file that it was made from, are copies.

        Raises:
            DataError: A sidecar cannot be read.
        """
        if isinstance(one, ShardIndex) and isinstance(other, ShardIndex):
            if _same_folder(one, other) and one.without_duplicates():
                return []
            ours: Sequence[str | None] = self._sample_digests(one)
            theirs: Sequence[str | None] = self._sample_digests(other)
        else:
            sizes = [list(map(size_of, clips)) for clips in (one, other)]
            equal = set(sizes[0]) & set(sizes[1]) - {None}
            one, other = (
                [clip for clip, size in zip(clips, found, strict=True) if size in equal]
                for clips, found in zip((one, other), sizes, strict=True)
            )
            ours, theirs = self._byte_digests(one), self._byte_digests(other)
        found = {digest: clip for digest, clip in zip(ours, one, strict=True) if digest is not None}
        return [
            (found[digest], clip)
            for digest, clip in zip(theirs, other, strict=True)
            if digest in found
        ]

    def _sample_digests(self, index: ShardIndex) -> list[str]:
        if id(index) not in self._samples:
            digests = [""] * len(index)
            for row, line in index.sidecar_lines():
                digests[row] = line["digest"]
            self._samples[id(index)] = index, digests  # an index that is kept keeps its id
        return self._samples[id(index)][1]

    def _byte_digests(self, clips: Sequence[ClipPath]) -> list[str | None]:
        new = [clip for clip in clips if clip not in self._bytes]
        with ThreadPoolExecutor(4, thread_name_prefix="ssast-hash") as threads:
            self._bytes.update(zip(new, threads.map(_digest, new), strict=True))
        return [self._bytes[clip] for clip in clips]


def size_of(clip: ClipPath) -> int | None:
    """Return the bytes of a clip; None for one that is missing."""
    try:
        return clip.size if isinstance(clip, ShardClip) else os.stat(clip).st_size
    except OSError:
        return None


def _digest(clip: ClipPath) -> str | None:
    try:
        data = clip.read() if isinstance(clip, ShardClip) else Path(clip).read_bytes()
    except (OSError, DataError):
        return None  # the pipeline names it when it comes up
    return hashlib.sha256(data).hexdigest()


def _same_folder(one: ShardIndex, other: ShardIndex) -> bool:
    folders = [
        str(index.folder) if is_url(index.folder) else os.path.realpath(index.folder)
        for index in (one, other)
    ]
    return folders[0] == folders[1]
