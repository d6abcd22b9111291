"""Events that people marked in long recordings: Raven selection tables, Audacity label tracks.

A table and its recording are matched by their names (``a.Table.1.selections.txt`` and ``a.wav``),
or by the columns in which Raven names the recording. Each event becomes a clip, a segment of its
recording; or each recording is cut into windows, which have the labels of the events in them.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssast.pipelines.audio.windows import lengths_s, window_starts
from ssast.pipelines.clips.labels import is_name
from ssast.pipelines.clips.manifest import audio_files
from ssast.pipelines.datasets.tables import Dataset, Listed, lines
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import told_encoding

SPLIT = "clips"
BEGIN, END, FILE, OFFSET = "begin time (s)", "end time (s)", "begin file", "file offset (s)"
RAVEN_TABLE = re.compile(r"\.Table\.\d+\.")  # site.Table.1.selections.txt is of site.wav
LABELS = (  # of Raven's tables, which have no column of their own for it; the first that is there
    *("annotation", "annotations", "label", "species", "species code", "common name", "class"),
    *("tag", "call type", "call", "type", "event"),
)


@dataclass(frozen=True)
class Reading:
    """How events become clips.

    Attributes:
        label_column: Column of the labels in Raven's tables; None for the first of :data:`LABELS`.
        window_s: Length in s of the windows that recordings are cut into; None: the events
            themselves are the clips.
        hop_s: Time in s between the starts of two windows; None is ``window_s``.
        background: Label of the windows that no event touches; None leaves them out.
    """

    label_column: str | None = None
    window_s: float | None = None
    hop_s: float | None = None
    background: str | None = None

    def check(self) -> None:
        """Check that the settings are in range.

        Raises:
            DataError: One is out of range, or needs another.
        """
        for name, value in (("--window-s", self.window_s), ("--hop-s", self.hop_s)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise DataError(f"{name} is {value:g}, expected a length in seconds above 0")
        for name, given in (("--hop-s", self.hop_s), ("--background", self.background)):
            if given is not None and self.window_s is None:
                raise DataError(f"{name} is for windows: expected --window-s as well")
        if self.background is not None and not is_name(self.background):
            raise DataError("--background is blank, expected the name of a class")


class Event(NamedTuple):
    """A marked event.

    Attributes:
        begin_s: Start in s from the start of the recording.
        end_s: End in s.
        label: Its label, without surrounding blanks; may be empty.
    """

    begin_s: float
    end_s: float
    label: str


Events = Mapping[str, list[Event]]  # of each recording that has a table, by its path
Read = Callable[[Path, "_Recordings", Reading], Iterator[tuple[str | None, Event | None]]]


def read_raven(source: Path, reading: Reading) -> Dataset:
    """Read the selection tables (.txt) of Raven, and of what writes the same form (BirdNET).

    A row is an event; the same selection in several views is one.

    Args:
        source: Folder of the recordings and the tables; they may lie anywhere below it.
        reading: How events become clips.

    Raises:
        DataError: There are no tables, one is malformed or has no column of labels.
    """
    return _read(source, reading, _raven_rows, "a selection table: tabs, a column 'Begin Time (s)'")


def read_audacity(source: Path, reading: Reading) -> Dataset:
    """Read the label tracks (.txt) that Audacity exports: begin, end and label with tabs between.

    Labels at a point have no duration: only windows can have them.

    Args:
        source: See :func:`read_raven`.
        reading: See there.

    Raises:
        DataError: There are no tracks, or one is malformed.
    """
    return _read(source, reading, _audacity_rows, "a label track: begin, tab, end, tab, label")


class _Recordings:
    """The recordings of a folder, by their names."""

    def __init__(self, source: Path) -> None:
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for path in audio_files(source):
            name = os.path.basename(path)
            self.by_name[name].append(path)
            self.by_stem[os.path.splitext(name)[0]].append(path)

    def of_table(self, table: Path) -> str | None:
        """Return the recording whose name a table's begins with, the longest; None if none is.

        Raven's own names hold the recording's whole name.
        """
        name = table.name
        own = RAVEN_TABLE.search(name)
        for end in [own.start()] if own else range(len(name), 0, -1):
            if end < len(name) and name[end] not in "._":
                continue
            found = self.by_name.get(name[:end]) or self.by_stem.get(name[:end])
            if found:
                return _one(found, table, name[:end])
        return None

    def named(self, name: str, table: Path) -> str | None:
        """Return the recording of a name in a table; None if there is none."""
        found = self.by_name.get(name.replace("\\", "/").rpartition("/")[2])
        return _one(found, table, name) if found else None


def _one(found: Sequence[str], table: Path, name: str) -> str:
    """Return the one recording, or the one in the table's own folder.

    Raises:
        DataError: There are several.
    """
    beside = [path for path in found if os.path.dirname(path) == os.path.abspath(table.parent)]
    if len(beside or found) > 1:
        first, second, *_ = beside or found
        raise DataError(f"{table}: {name} may be {first} or {second}: expected one recording")
    return (beside or found)[0]


def _read(source: Path, reading: Reading, rows: Read, form: str) -> Dataset:
    """Read all tables in a folder and below."""
    reading.check()
    recordings = _Recordings(source)
    events: dict[str, list[Event]] = {}
    missing: list[Listed] = []
    tables = sorted(path for path in source.rglob("*.txt") if not path.name.startswith("."))
    tables = [path for path in tables if path.is_file()]
    if not tables:
        raise DataError(f"{source}: found no .txt, expected {form}")
    notes = []
    for table in tables:
        found_rows = list(rows(table, recordings, reading))
        if not found_rows:
            notes.append(f"{table}: has no rows, or is no table, and no recording has its name")
        for path, event in found_rows:
            if path is None:
                place = "" if event is None else f": {event.begin_s:g} s"
                missing.append(Listed(f"{table.name}{place}", None))
            else:
                found = events.setdefault(path, [])
                if event is not None:
                    found.append(event)
    usable, more = _usable(events, points=reading.window_s is not None)
    notes += more
    if not any(usable.values()):
        raise DataError(f"{source}: no labelled event in {len(tables)} tables of its recordings")
    names = sorted({event.label for found in usable.values() for event in found})
    if reading.window_s is None:
        clips = list(_event_clips(usable))
    else:
        clips, more = _windows(events, usable, reading.window_s, reading)
        notes += more
        if reading.background is not None:
            names = sorted({*names, reading.background})
        used = {name for clip in clips for name in clip.labels}
        for name in sorted({*names} - used):
            notes.append(f"{name}: no window has this label")
        names = [name for name in names if name in used]
    untold = sum(map(len, recordings.by_name.values())) - len(events)
    if untold:
        notes.append(f"{untold} recordings have no table, and no clips")
    return Dataset({SPLIT: [*clips, *missing]}, [(name, name) for name in names], notes=notes)


def _usable(events: Events, *, points: bool) -> tuple[dict[str, list[Event]], list[str]]:
    """Return the events that have a label, each once; and notes on the others.

    Args:
        events: All events.
        points: Keep those without duration.
    """
    usable: dict[str, list[Event]] = {}
    short = blank = 0
    for path, found in events.items():
        blank += sum(event.label == "" for event in found)
        named = [event for event in found if event.label]
        kept = [event for event in named if points or event.end_s > event.begin_s]
        short += len(named) - len(kept)
        usable[path] = sorted(set(kept))
    notes = []
    if short:
        notes.append(
            f"{short} labels at a point, without duration, are left out: --window-s makes windows "
            "of them"
        )
    if blank:
        notes.append(f"{blank} events without a label are left out")
    return usable, notes


def _event_clips(events: Events) -> Iterator[Listed]:
    """Yield a clip for each event; events from the same to the same time are one, of two labels."""
    for path, found in sorted(events.items()):
        labels: dict[tuple[float, float], list[str]] = defaultdict(list)
        for event in found:
            labels[event.begin_s, event.end_s].append(event.label)
        for (begin_s, end_s), names in labels.items():
            span = (begin_s, round(end_s - begin_s, 6))
            yield Listed(os.path.basename(path), path, tuple(names), span)


def _windows(
    events: Events, usable: Events, window_s: float, reading: Reading
) -> tuple[list[Listed], list[str]]:
    """Return the windows of the recordings that have a table; and notes on events in none.

    A window has the label of an event if it holds half of it, or is half filled by it; and of one
    at a point in it, or at its border. What is touched by events and has no label is left out: it
    is neither background nor an example.
    """
    paths = sorted(usable)
    clips, beyond = [], []
    for path, length in zip(paths, lengths_s(paths), strict=True):
        if length is None:
            raise DataError(f"{path}: cannot be cut into windows: its length is not known")
        beyond += [
            f"{path}: {event.begin_s:g} s, of {length:g} s"
            for event in events[path]
            if event.begin_s >= length
        ]
        for begin_s in window_starts(length, window_s, reading.hop_s or window_s):
            end_s = min(begin_s + window_s, length)
            names = {
                event.label
                for event in usable[path]
                if _overlap_s(event, begin_s, end_s)
                >= 0.5 * min(window_s, event.end_s - event.begin_s)
            }
            touched = any(_touches(event, begin_s, end_s) for event in events[path])
            if not touched and reading.background is not None:
                names = {reading.background}
            if names:
                span = (begin_s, round(end_s - begin_s, 6))
                clips.append(Listed(os.path.basename(path), path, tuple(sorted(names)), span))
    if not beyond:
        return clips, []
    return clips, [
        f"{len(beyond)} events begin beyond the end of their recording, and are in no window; the "
        f"first: {beyond[0]}"
    ]


def _touches(event: Event, begin_s: float, end_s: float) -> bool:
    overlap_s = _overlap_s(event, begin_s, end_s)
    return overlap_s > 0 or (overlap_s == 0 and event.end_s == event.begin_s)


def _overlap_s(event: Event, begin_s: float, end_s: float) -> float:
    return min(event.end_s, end_s) - max(event.begin_s, begin_s)


def _raven_rows(
    table: Path, recordings: _Recordings, reading: Reading
) -> Iterator[tuple[str | None, Event | None]]:
    """Yield (recording, event) of each row; (recording, None) for an empty table."""
    header: dict[str, int] = {}
    column = width = 0
    own = recordings.of_table(table)
    places: set[str] = set()
    for place, text in lines(table, encoding=_codec(table), tabs=True):
        cells = [cell.strip() for cell in text.split("\t")]
        if not header:
            header, width = {name.lower(): n for n, name in enumerate(cells)}, len(cells)
            if BEGIN not in header or END not in header:
                return  # another text file
            label = _label_column(table, header, reading.label_column)
            for name in (label, BEGIN, END, FILE, OFFSET):
                if [cell.lower() for cell in cells].count(name) > 1:
                    raise DataError(f"{place}: expected one column {name!r}, found several")
            column = header[label]
            if own is not None:
                yield own, None
            continue
        if any(cells[width:]):
            raise DataError(
                f"{place}: expected {width} cells, as in the header, found {len(cells)}"
            )
        cells += [""] * (width - len(cells))
        begin_s, end_s = (_number(cells[header[name]], name, place) for name in (BEGIN, END))
        path = own
        if cells[header.get(FILE, -1)] and FILE in header:
            path = recordings.named(cells[header[FILE]], table)
            places.add(cells[header[FILE]])
        if OFFSET in header and cells[header[OFFSET]]:
            start_s = _number(cells[header[OFFSET]], OFFSET, place)
            begin_s, end_s = start_s, start_s + (end_s - begin_s)
        elif len(places) > 1:
            raise DataError(
                f"{place}: times over several recordings: expected a column 'File Offset (s)'"
            )
        yield path, _event(begin_s, end_s, cells[column], place)


def _codec(table: Path) -> str | None:
    """Return the codec of a table that is no Unicode."""
    try:
        return told_encoding(table)
    except OSError:  # said when it is read
        return None


def _label_column(table: Path, header: Mapping[str, int], wanted: str | None) -> str:
    """Return the column that holds the labels.

    Raises:
        DataError: It is not there.
    """
    names = LABELS if wanted is None else (wanted.strip().lower(),)
    found = next((name for name in names if name in header), None)
    if found is None:
        raise DataError(
            f"{table}: expected a column of labels ({', '.join(names)}), found "
            f"{', '.join(header)!s:.200}: --label-column names it"
        )
    return found


def _audacity_rows(
    table: Path, recordings: _Recordings, reading: Reading
) -> Iterator[tuple[str | None, Event | None]]:
    """Yield (recording, event) of each label; (recording, None) for an empty track."""
    own = recordings.of_table(table)
    if own is not None:
        yield own, None
    for place, text in lines(table, encoding=_codec(table)):
        if text.startswith("\\"):  # the frequencies of the label before
            continue
        begin, *rest = text.split("\t", 2)
        if not rest:
            raise DataError(f"{place}: expected begin, tab, end, tab, label, found {text!r:.80}")
        label = rest[1].strip() if len(rest) > 1 else ""
        times = _number(begin, "begin", place), _number(rest[0], "end", place)
        yield own, _event(*times, label, place)


def _number(text: str, name: str, place: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = np.nan
    if not math.isfinite(found):
        raise DataError(f"{place}: expected seconds under {name!r}, found {text!r:.40}")
    return found


def _event(begin_s: float, end_s: float, label: str, place: str) -> Event:
    if begin_s < 0 or end_s < begin_s:
        raise DataError(
            f"{place}: expected an event that begins at 0 s or later and ends after its begin, "
            f"found {begin_s:g} s to {end_s:g} s"
        )
    return Event(begin_s, end_s, label)
