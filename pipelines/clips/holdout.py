"""The one rule for what is held out: whole recordings, a share of each class, always the same.

Clips of one recording sound alike and may overlap, so one whose neighbour was trained on measures
nothing. Everything here is a pure function of the recordings, their clips and labels, and of a
fixed seed: the order in which the clips are listed does not matter.
"""

import itertools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssast.pipelines.clips.listed import FileList
from ssast.pipelines.clips.mix import MixedClips
from ssast.pipelines.clips.order import permutation, row_type
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shards import ClipPaths, ShardIndex
from ssast.pipelines.clips.shared import MANY, ArrayWriter, shared_arrays
from ssast.pipelines.clips.tars import TarIndex
from ssast.pipelines.errors import TooFewRecordings

SEED = 0  # fixed: a run that is resumed, and every rank of it, must hold out the same clips
Labels = Sequence[Sequence[Hashable]]

log = logging.getLogger(__name__)


def recordings_of(paths: ClipPaths) -> np.ndarray:
    """Return the number of the recording that each clip was cut from, [n] integers.

    Prepared shards know it; in other tar archives it is the sample. Any other file is taken for a
    recording of its own, of which segments are clips; files are numbered in the order of their
    paths.

    Raises:
        DataError: The list of the recordings cannot be read.
    """
    if isinstance(paths, ShardIndex | TarIndex):
        return paths.recordings()
    if isinstance(paths, MixedClips):
        parts = [recordings_of(part) for part in paths.parts]
        counts = [int(part.max(initial=-1)) + 1 for part in parts]
        starts = itertools.accumulate(counts[:-1], initial=0)
        return np.concatenate([part + start for part, start in zip(parts, starts, strict=True)])
    return _file_list(paths).numbers()


def _file_list(paths: ClipPaths) -> FileList:
    if isinstance(paths, FileList):
        return paths
    return FileList.of(path if isinstance(path, Segment) else str(path) for path in paths)


def split_clips(paths: ClipPaths, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those to hold out, [n] integers; see :func:`hold_out_clips`.

    Those of a list of many clips are found once on a machine.

    Raises:
        TooFewRecordings: See there.
        DataError: See there.
    """

    def rows() -> tuple[np.ndarray, np.ndarray]:
        held = hold_out_clips(paths, share)
        kind = row_type(len(held))
        return np.flatnonzero(~held).astype(kind), np.flatnonzero(held).astype(kind)

    def build(writer: ArrayWriter) -> None:
        train, held = rows()
        writer.write("train", train)
        writer.write("held", held)

    identity = paths.identity if isinstance(paths, FileList | ShardIndex | TarIndex) else None
    if identity is None or len(paths) < MANY:
        return rows()
    what, state = identity
    found = shared_arrays(("held out", share, what), (SEED, np.__version__, state), build)
    return found["train"], found["held"]


def hold_out_clips(paths: ClipPaths, share: float, labels: Labels | None = None) -> np.ndarray:
    """Choose the clips of a data set to hold out, see :func:`hold_out`.

    Of one recording alone without labels, single clips are held out, with a warning.

    Raises:
        TooFewRecordings: There is one alone, and its clips overlap; or see :func:`hold_out`.
        DataError: A list of the prepared folder cannot be read.
    """
    recordings = recordings_of(paths)
    alone = len(paths) > 1 and bool((recordings == recordings[0]).all())
    if alone and labels is None and not isinstance(paths, MixedClips):
        clips = paths if isinstance(paths, ShardIndex) else _file_list(paths)
        if clips.overlapping():
            raise TooFewRecordings(
                "clips of one recording that overlap cannot be held out from each other: expected "
                "two recordings or more"
            )
        log.warning(
            "%s: one recording alone: clips of it are held out whose neighbours are trained on",
            paths.folder if isinstance(paths, ShardIndex) else paths[0],
        )
        recordings = np.arange(len(paths))
    return hold_out(recordings, share, labels)


def hold_out(
    recordings: Sequence[Any] | np.ndarray, share: float, labels: Labels | None = None
) -> np.ndarray:
    """Choose the clips to hold out; those of one recording stay together.

    Recordings are taken in a drawn order until a class has its share of clips, rare classes first.
    One that would bring a class, this or another, to more than twice its share is passed over,
    unless there are only such: then it is that which exceeds it least. Every class keeps a
    recording to train on. With one label a recording, every class that has two recordings has one
    that is held out as well; with several labels that is not always possible.

    Args:
        recordings: Number or name of each clip's recording, [n].
        share: Share of the clips to hold out, in (0, 1): of each class where there are labels.
        labels: Classes of each clip, numbers or names, [n]; clips without any are of one class
            more. All clips are of one class if None.

    Returns:
        [n] bool, True for the clips to hold out: neither all nor none.

    Raises:
        TooFewRecordings: There is only one, or no class with two that can be divided.
    """
    table = _Classes.of(recordings, labels)
    held = np.zeros(table.num_recordings, bool)
    trained = np.array([len(members) for members, _ in table.classes])  # recordings of each class
    totals = [int(sizes.sum()) for _, sizes in table.classes]
    wanted = np.array([max(1, round(share * total)) for total in totals])  # clips of each class
    have = np.zeros_like(wanted)

    def excess(recording: int) -> float:
        """Return how many times its share a class would have held out with this one, at most."""
        classes, sizes = table.classes_of(recording)
        return float(((have[classes] + sizes) / wanted[classes]).max())

    def hold(recording: int) -> bool:
        """Hold a recording out unless a class would have none left to train on."""
        classes, sizes = table.classes_of(recording)
        if held[recording] or (trained[classes] < 2).any():
            return False
        held[recording] = True
        trained[classes] -= 1
        have[classes] += sizes
        return True

    for number, members in table.rare_first():
        for recording in members:
            if have[number] >= wanted[number]:
                break
            if excess(recording) <= 2:
                hold(recording)
        if not have[number]:  # with every recording that may be held out some class has too much
            any(map(hold, sorted(members, key=excess)))
    if not held.any():
        raise TooFewRecordings(
            "no class has two recordings, expected one to train on and one to hold out"
            if table.num_recordings > 1
            else f"holds {table.num_recordings} recording, expected two or more: one is held out"
        )
    return held[table.recordings]


def assign_folds(
    recordings: Sequence[Any] | np.ndarray, labels: Labels, num_folds: int
) -> np.ndarray:
    """Deal recordings out to the folds of a cross-validation, each class evenly.

    With one label a recording, a class of ``num_folds`` recordings or more is in every fold.

    Args:
        recordings: Number or name of each clip's recording, [n].
        labels: Classes of each clip, [n].
        num_folds: Number of folds, 2 or more.

    Returns:
        [n] int64, the fold of each clip, from 0.
    """
    table = _Classes.of(recordings, labels)
    fold = np.full(table.num_recordings, -1)
    total = np.zeros(num_folds, np.int64)
    for number, members in table.rare_first():
        sizes = table.classes[number][1]
        here = fold[members]
        have = np.bincount(here[here >= 0], sizes[here >= 0], num_folds)
        for row in np.argsort(-sizes, kind="stable"):  # the largest first: the others even it out
            recording = members[row]
            if fold[recording] < 0:
                emptiest = np.lexsort((total, have))[0]
                fold[recording] = emptiest
                have[emptiest] += sizes[row]
                total[emptiest] += sizes[row]
    return fold[table.recordings]


@dataclass(frozen=True)
class _Classes:
    """The recordings of each class.

    Attributes:
        recordings: [n] int64, the recording of each clip, from 0, in the order of their keys.
        num_recordings: G.
        classes: (recordings, number of their clips) of each class, in the drawn order.
    """

    recordings: np.ndarray
    num_recordings: int
    classes: list[tuple[np.ndarray, np.ndarray]]
    _by_recording: tuple[np.ndarray, np.ndarray, np.ndarray]  # classes, clips, where each begins

    @staticmethod
    def of(keys: Sequence[Any] | np.ndarray, labels: Labels | None) -> "_Classes":
        recordings, count = _from_zero(np.asarray(keys))
        if labels is None:  # millions of clips: nothing is sorted
            drawn = permutation(SEED, 0, count)
            sizes = np.bincount(recordings, minlength=count)[drawn]
            of_class = np.zeros(count, np.int8)
            each = (of_class, np.bincount(recordings, minlength=count), np.arange(count + 1))
            return _Classes(recordings, count, [(drawn, sizes)], each)
        clips, classes = numbered(labels)
        # Each pair of a class and a recording of it once, with the number of clips.
        pairs, sizes = np.unique(classes * count + recordings[clips], return_counts=True)
        of_class, of_recording = np.divmod(pairs, max(count, 1))
        rank = np.empty(count, np.int64)
        rank[permutation(SEED, 0, count)] = np.arange(count)
        drawn = np.lexsort((rank[of_recording], of_class))
        ends = np.cumsum(np.bincount(of_class))[:-1]
        parts = zip(np.split(of_recording[drawn], ends), np.split(sizes[drawn], ends), strict=True)
        grouped = np.argsort(of_recording, kind="stable")
        starts = np.searchsorted(of_recording[grouped], np.arange(count + 1))
        each = (of_class[grouped], sizes[grouped], starts)
        return _Classes(recordings, count, list(parts), each)

    def rare_first(self) -> list[tuple[int, np.ndarray]]:
        """Return number and recordings of the classes, those of the fewest recordings first."""
        numbered = ((number, members) for number, (members, _) in enumerate(self.classes))
        return sorted(numbered, key=lambda part: len(part[1]))

    def classes_of(self, recording: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes of a recording, and how many of its clips are of each."""
        classes, sizes, starts = self._by_recording
        here = slice(starts[recording], starts[recording + 1])
        return classes[here], sizes[here]


def _from_zero(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the place of each key among the sorted different ones, and their number."""
    if keys.dtype.kind == "i" and len(keys) and keys.min() >= 0 and keys.max() < 4 * len(keys):
        places = np.zeros(keys.max() + 1, row_type(len(keys)))
        places[keys] = 1
        count = int(places.sum())
        np.cumsum(places, out=places)
        places -= 1
        return places[keys], count
    found, recordings = np.unique(keys, return_inverse=True)
    return recordings, len(found)


def numbered(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return the clip and the class, as numbers, of every label; no label is the last class."""
    found = set(itertools.chain.from_iterable(labels))
    number = {name: place for place, name in enumerate(sorted(found))}  # type: ignore[type-var]
    classes = [[number[name] for name in names] or [len(number)] for names in labels]
    clips = np.repeat(np.arange(len(labels)), [len(numbers) for numbers in classes])
    return clips, np.array(list(itertools.chain.from_iterable(classes)), np.int64)
