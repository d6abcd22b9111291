"""Several data sets as one, each with its share of the clips that are drawn."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from ssast.pipelines.clips.order import Weights
from ssast.pipelines.clips.remote import is_url
from ssast.pipelines.clips.shards import ClipPath, ClipPaths, ShardIndex


class MixedClips(Sequence[ClipPath]):
    """The clips of several data sets, one set after the other; files and shards may be mixed.

    Args:
        parts: The clips of each set, at least one.
        shares: Of each set, above 0, relative to the others.
    """

    def __init__(self, parts: Sequence[ClipPaths], shares: Sequence[float]) -> None:
        self.parts, self.shares = tuple(parts), tuple(shares)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        """Number of clips of all sets."""
        return self._ends[-1]

    @overload
    def __getitem__(self, place: int) -> ClipPath: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ClipPath]: ...

    def __getitem__(self, place: int | slice) -> "ClipPath | Sequence[ClipPath]":
        """A clip, or a list of some."""
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = range(len(self))[place]  # of a negative one, and of one beyond the end
        number = bisect.bisect_right(self._ends, row)
        return self.parts[number][row - self._ends[number] + len(self.parts[number])]

    def __iter__(self) -> Iterator[ClipPath]:
        return itertools.chain.from_iterable(self.parts)

    def weights(self) -> Weights:
        """How often each clip comes up: its set as its share says, equal ones within the set."""
        total = sum(self.shares)
        sets = zip(self.shares, self.parts, strict=True)
        return Weights(
            np.concatenate([np.full(len(p), share / total / len(p)) for share, p in sets])
        )


def is_remote(paths: ClipPaths) -> bool:
    """Whether some of the clips lie behind a URL."""
    parts = paths.parts if isinstance(paths, MixedClips) else (paths,)
    return any(isinstance(part, ShardIndex) and is_url(part.folder) for part in parts)


def fingerprint(paths: ClipPaths) -> str:
    """Hash that changes when clips are added, left out or put in another order.

    Of files the names alone count, of shards the places in them: a data set may move to another
    folder. Of a mix the shares count as well.
    """
    if isinstance(paths, ShardIndex):
        return paths.fingerprint()
    if isinstance(paths, MixedClips):
        text = "\n".join(map(fingerprint, paths.parts)) + f"\n{paths.shares}"
    else:
        text = "\n".join(os.path.basename(str(path)) for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()
