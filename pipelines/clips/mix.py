"""Several data sets as one, each with its share of the clips drawn in training."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.order import Weights
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.shards import ClipPath, ClipPaths, ShardIndex
from ssast.pipelines.clips.tars import TarIndex


class MixedClips(Sequence[ClipPath]):
    """The clips of several data sets, one set after the other; files and shards may be mixed.

    Args:
        parts: Clips of each set, at least one.
        shares: Share of each set, above 0, relative to the others.
    """

    def __init__(self, parts: Sequence[ClipPaths], shares: Sequence[float]) -> None:
        self.parts, self.shares = tuple(parts), tuple(shares)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        """Return the number of clips of all sets."""
        return self._ends[-1]

    @overload
    def __getitem__(self, row: int) -> ClipPath: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[ClipPath]: ...

    def __getitem__(self, row: int | slice) -> "ClipPath | Sequence[ClipPath]":
        """Return a clip, or a list of some."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # counts a negative row from the end; IndexError beyond it
        number = bisect.bisect_right(self._ends, row)
        return self.parts[number][row - self._ends[number] + len(self.parts[number])]

    def __iter__(self) -> Iterator[ClipPath]:
        return itertools.chain.from_iterable(self.parts)

    def weights(self) -> Weights:
        """Return sampling weights: each set in proportion to its share, uniform within the set."""
        total = sum(self.shares)
        sets = zip(self.shares, self.parts, strict=True)
        values = [np.full(len(part), share / total / len(part)) for share, part in sets]
        return Weights(np.concatenate(values), [len(part) for part in self.parts])


def select(paths: ClipPaths, rows: np.ndarray) -> ClipPaths:
    """Return some of the clips; those of a mix stay one, without the sets of which there is none.

    Args:
        paths: All clips.
        rows: Rows of the clips to return, [n] int64; ascending for a mix.
    """
    if isinstance(paths, ShardIndex | FileList | TarIndex):
        return paths.subset(rows)
    if not isinstance(paths, MixedClips):
        return [paths[row] for row in rows]
    ends = list(itertools.accumulate(map(len, paths.parts), initial=0))
    cuts = np.searchsorted(rows, ends)
    chosen = [
        (select(part, rows[first:last] - start), share)
        for part, share, start, (first, last) in zip(
            paths.parts, paths.shares, ends, itertools.pairwise(cuts), strict=False
        )
        if last > first
    ]
    return MixedClips(*zip(*chosen, strict=True))


def is_remote(paths: ClipPaths) -> bool:
    """Return whether some of the clips are behind a URL."""
    parts = paths.parts if isinstance(paths, MixedClips) else (paths,)
    return any(
        (isinstance(part, ShardIndex) and is_url(part.folder))
        or (isinstance(part, TarIndex) and part.is_remote)
        for part in parts
    )


def fingerprint(paths: ClipPaths) -> str:
    """Return a hash that changes when clips are added, left out or put in another order.

    It covers the names of files without their folders, the positions of clips in shards, and the
    shares of a mix: a data set may be moved to another folder.
    """
    if isinstance(paths, ShardIndex | FileList | TarIndex):
        return paths.fingerprint()
    if isinstance(paths, MixedClips):
        text = "\n".join(map(fingerprint, paths.parts)) + f"\n{paths.shares}"
    else:
        text = "\n".join(os.path.basename(str(path)) for path in paths)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
