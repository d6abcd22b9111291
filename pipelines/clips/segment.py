"""A clip that is a part of a longer recording, and the columns of a manifest that say which."""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ssast.pipelines.errors import DataError
from ssast.pipelines.text import shown

TimeKeys = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
ONSET, OFFSET = "onset", "offset"  # beside each other, as in DCASE's tables, begin and end
WHOLE = (0.0, math.inf)  # begin and duration of a clip that is a whole file


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a recording.

    Attributes:
        path: Path of the recording.
        begin_s: Start of the segment in s.
        duration_s: Duration of the segment in s; infinite up to the end of the recording.
    """

    path: str
    begin_s: float
    duration_s: float

    def __str__(self) -> str:
        return f"{self.path}{span_text(self.begin_s, self.duration_s)}"


FileClip = str | Segment  # a whole file, or a part of one


class Files(NamedTuple):
    """Consecutive clips of a list.

    Attributes:
        names: Paths of the files.
        seconds: Begin and duration of each clip in s, [n, 2] float64; None if all are whole files.
    """

    names: list[str]
    seconds: np.ndarray | None = None

    @staticmethod
    def of(clips: Iterable[FileClip]) -> "Files":
        """Return these clips."""
        clips = list(clips)
        names = [clip.path if isinstance(clip, Segment) else clip for clip in clips]
        if len(set(map(type, clips)) - {str}) == 0:
            return Files(names)
        spans = [
            (clip.begin_s, clip.duration_s) if isinstance(clip, Segment) else WHOLE
            for clip in clips
        ]
        return Files(names, np.array(spans, np.float64))

    def keys(self) -> Iterator[Hashable]:
        """Make what has the hash of each clip in turn: its path, or all that a segment holds."""
        if self.seconds is None:
            return iter(self.names)
        begins, durations = self.seconds.T
        if bool(((begins == WHOLE[0]) & (durations == WHOLE[1])).any()):
            return self.clips()
        return zip(self.names, begins.tolist(), durations.tolist(), strict=True)

    def clips(self) -> Iterator[FileClip]:
        """Make the clips in turn."""
        if self.seconds is None:
            yield from self.names
            return
        for name, (begin_s, duration_s) in zip(self.names, self.seconds.tolist(), strict=True):
            yield file_clip(name, begin_s, duration_s)


def file_clip(name: str, begin_s: float, duration_s: float) -> FileClip:
    """Return a part of a file, or its path if it is the whole file."""
    whole = (begin_s, duration_s) == WHOLE
    return name if whole else Segment(name, begin_s, duration_s)


def span_text(begin_s: float, duration_s: float) -> str:
    """Return the name of a part of a recording, such as ``[12.5-17.5 s]``."""
    if math.isinf(duration_s):
        return f"[{_number(begin_s)} s to end]"
    return f"[{_number(begin_s)}-{_number(begin_s + duration_s)} s]"


def _number(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def read_seconds(
    columns: Sequence[Mapping[str, Any]], keys: TimeKeys, where: Callable[[int], str]
) -> np.ndarray | None:
    """Read begin and duration of entries; a duration alone tells how long the file is.

    Args:
        columns: Columns of each entry, by name.
        keys: Names of those that may hold begin, end and duration.
        where: Returns the location of an entry, for messages.

    Returns:
        Begin and duration in s, [n, 2] float64; None if the entries are whole files.

    Raises:
        DataError: One is no number, the begin is negative, or nothing lies between begin and end.
    """
    if all(map(frozenset(keys[0] + keys[1]).isdisjoint, columns)):
        return None
    plain = _plain_seconds(columns, keys)
    if plain is not None:
        return plain
    seconds = np.empty((len(columns), 2))
    for row, entry in enumerate(columns):
        begin, end, duration = (
            _seconds(entry, key, where, row) for key in _own_keys(entry.keys(), keys)
        )
        begin_s = 0.0 if begin is None else begin
        if end is not None:
            duration = end - begin_s
        elif begin is None:
            duration = None
        if begin_s < 0 or (duration is not None and not duration > 0):
            raise DataError(
                f"{where(row)}: expected a segment that begins at 0 s or later and ends after "
                f"its begin, found {begin_s:g} s to {begin_s + (duration or 0.0):g} s"
            )
        seconds[row] = begin_s, math.inf if duration is None else duration
    return None if bool((seconds == WHOLE).all()) else seconds


def _plain_seconds(columns: Sequence[Mapping[str, Any]], keys: TimeKeys) -> np.ndarray | None:
    """Return begin and duration of entries, looked at together; None if one needs a closer look."""
    first = columns[0].keys()
    begin, end, duration = _own_keys(first, keys)
    until = end or duration
    if begin is None or until is None or any(entry.keys() != first for entry in columns):
        return None
    given = [(entry[begin], entry[until]) for entry in columns]
    if any(isinstance(value, bool) for pair in given for value in pair):
        return None
    try:
        seconds = np.array([(float(one), float(other)) for one, other in given])
    except (TypeError, ValueError, OverflowError):
        return None
    if end is not None:
        seconds[:, 1] -= seconds[:, 0]
    usable = np.isfinite(seconds).all() and (seconds[:, 0] >= 0).all() and (seconds[:, 1] > 0).all()
    return seconds if usable else None


def _own_keys(given: Collection[str], keys: TimeKeys) -> tuple[str | None, str | None, str | None]:
    """Return those of the keys that an entry has for begin, end and duration."""
    begin, end, duration = (next((key for key in group if key in given), None) for group in keys)
    if end == OFFSET and len(keys[1]) > 1 and begin != ONSET:
        end = None
    return begin, end, duration


def _seconds(
    entry: Mapping[str, Any], key: str | None, where: Callable[[int], str], row: int
) -> float | None:
    """Return a time in s; None for one that is not given, or blank."""
    given = None if key is None else entry[key]
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    try:
        if isinstance(given, bool):
            raise ValueError
        found = float(given)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{where(row)}: expected seconds under {key!r}, found {shown(given)}")
    return found
