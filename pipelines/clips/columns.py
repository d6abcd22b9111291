"""Which columns of a table hold the clips and their labels: by the names in use, or as set."""

import codecs
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from ssast.pipelines.clips.segment import OFFSET, ONSET, TimeKeys
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import shown

log = logging.getLogger(__name__)

PATH_KEYS = (
    *("wav", "path", "file", "filename", "file_name", "audio", "audio_filepath", "audio_path"),
    *("filepath", "file_path", "fname", "slice_file_name"),
)
LABEL_KEYS = ("labels", "label", "category", "class_name", "class", "target")
BEGIN_KEYS = (ONSET, "begin", "start", OFFSET)
END_KEYS = ("end", OFFSET)  # beside an onset alone
DURATION_KEYS = ("duration",)
ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "wav": PATH_KEYS,
        "labels": LABEL_KEYS,
        "begin": BEGIN_KEYS,
        "end": END_KEYS,
        "duration": DURATION_KEYS,
    }
)
TIMES = ("begin", "end", "duration")
SLICES = "slice_file_name"  # of UrbanSound8K, whose start and end are of another recording
LABEL_LIKE = frozenset(
    (
        *(*LABEL_KEYS, "classid", "class_id", "label_id", "labelid", "tag", "tags", "species"),
        *("genre", "genres", "emotion", "event_label", "scene_label", "primary_label", "mids"),
    )
)
DELIMITERS = (",", "\t", ";", "|")
MOST_NAMED = 12  # columns in a message


@dataclass(frozen=True)
class TableFormat:
    """How tables are read, where that is set and not found out.

    Attributes:
        columns: Name of the column by what it holds: ``wav``, ``labels``, ``begin``, ``end``,
            ``duration``. Columns without names are ``1``, ``2``, ...; an empty name: not used.
        label_separator: What separates labels in a cell or a text; None: a comma in the published
            JSON, and nothing elsewhere.
        delimiter: What separates cells, ``tab`` for a tab; None: found out.
        encoding: Encoding of the text; None: found out.

    Raises:
        DataError: There is no such role, delimiter or encoding.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    label_separator: str | None = None
    delimiter: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for role in self.columns:
            if role not in ROLES:
                known = ", ".join(ROLES)
                raise DataError(f"data.columns: expected some of {known}, found {shown(role)}")
        if self.label_separator is not None and not self.label_separator:
            raise DataError("data.label_separator: expected one or more characters, found none")
        if self.delimiter in ("tab", "\\t"):
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or self.delimiter in '"\r\n' or not self.delimiter.isascii()
        ):
            raise DataError(
                "data.delimiter: expected one character, or tab, found " + shown(self.delimiter)
            )
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
                codecs.lookup(self.encoding)
            except (LookupError, ValueError, UnicodeError) as error:
                raise DataError(
                    f"data.encoding: expected utf-8, utf-16, cp1252, ..., found "
                    f"{shown(self.encoding)}"
                ) from error

    def key(self) -> tuple[str, ...]:
        """Return what tells this format from others."""
        columns = [f"{role}={name}" for role, name in sorted(self.columns.items())]
        return (*columns, repr((self.label_separator, self.delimiter, self.encoding)))


PLAIN = TableFormat()


@dataclass(frozen=True)
class Columns:
    """The columns of a table, each under the name that its rows have it under.

    Attributes:
        wav: Column of the paths; None if none is known.
        labels: Column of the labels; None if there is none.
        begin: Column of the begin of each clip in its recording, in s.
        end: Column of its end, in s.
        duration: Column of its length, in s.
        unused: The others.
        set_by_hand: What :attr:`TableFormat.columns` names.
    """

    wav: str | None
    labels: str | None = None
    begin: str | None = None
    end: str | None = None
    duration: str | None = None
    unused: tuple[str, ...] = ()
    set_by_hand: frozenset[str] = frozenset()

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the columns that are read."""
        found = (self.wav, self.labels, self.begin, self.end, self.duration)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    @property
    def time_keys(self) -> TimeKeys:
        """Keys of an entry that may hold begin, end and duration.

        Later entries of JSON may have times where the first has none.
        """
        others: TimeKeys = (BEGIN_KEYS, END_KEYS, DURATION_KEYS)
        if is_slices(self.wav):
            others = ((), (), ())
        begin, end, duration = (
            (name,) if name is not None else () if role in self.set_by_hand else other
            for role, other in zip(TIMES, others, strict=True)
            for name in (getattr(self, role),)
        )
        return begin, end, duration

    def describe(self) -> str:
        """Return a line on what is read from where, and what is not read."""
        parts = [f"clips in {self.wav!r}"]
        parts += [f"labels in {self.labels!r}" if self.labels else "no labels"]
        parts += [f"{role} in {getattr(self, role)!r}" for role in TIMES if getattr(self, role)]
        line = ", ".join(parts)
        if self.unused:
            names = ", ".join(map(repr, self.unused[:MOST_NAMED]))
            more = ", ..." if len(self.unused) > MOST_NAMED else ""
            line += f"; not used: {names}{more}"
        alike = ", ".join(map(repr, self.label_like()))
        if alike:
            line += f" ({alike} may be labels: data.columns={{labels: NAME}} takes another column)"
        return line

    def label_like(self) -> list[str]:
        """Return the unused columns whose names are those of labels."""
        return [name for name in self.unused if name.strip().lower() in LABEL_LIKE]


def find_columns(names: Sequence[str], table: TableFormat, source: object) -> Columns:
    """Find the columns of a table by their names.

    Args:
        names: Names of its columns, or of the keys of its first entry.
        table: What is set by hand.
        source: The table, for messages.

    Raises:
        DataError: A column that is set is not there, or one that is used is there twice.
    """
    by_name: dict[str, str] = {}
    for name in names:
        by_name.setdefault(name.strip().lower(), name)
    found: dict[str, str | None] = {}
    for role, known in ROLES.items():
        wanted = table.columns.get(role)
        if wanted is None:
            key = next((key for key in known if key in by_name), None)
            found[role] = None if key is None else by_name[key]
        elif not wanted:
            found[role] = None
        elif wanted in names:
            found[role] = wanted
        elif wanted.strip().lower() in by_name:
            found[role] = by_name[wanted.strip().lower()]
        else:
            raise DataError(
                f"{source}: data.columns={{{role}: {wanted}}}: expected such a column, found "
                f"{list(names)!s:.200}"
            )
    _find_times(found, table.columns.keys())
    unused = tuple(dict.fromkeys(name for name in names if name and name not in found.values()))
    for name in filter(None, found.values()):
        count = sum(other.strip().lower() == name.strip().lower() for other in names)
        if count > 1:
            raise DataError(f"{source}: expected one column {name.strip()!r}, found {count}")
    return Columns(**found, unused=unused, set_by_hand=frozenset(table.columns))


def _find_times(found: dict[str, str | None], by_hand: Collection[str]) -> None:
    """Undo what the names of times do not mean beside each other."""
    if is_slices(found["wav"]):
        found |= {role: None for role in TIMES if role not in by_hand}
    begin, end = ((found[role] or "").strip().lower() for role in ("begin", "end"))
    if end == OFFSET and begin != ONSET and "end" not in by_hand:
        found["end"] = None
    if found["end"] is None and found["begin"] is None:  # it is that of the whole file
        found["duration"] = None


def is_slices(name: str | None) -> bool:
    """Return whether a column names the slices of UrbanSound8K, which are files of their own."""
    return name is not None and name.strip().lower() == SLICES


def say_unused(source: object, table: TableFormat) -> None:
    """Say once that the format of a table is set for what is none."""
    if table != PLAIN:
        names = "data.columns, data.label_separator, data.delimiter and data.encoding"
        say_once(str(source), f"is no table: {names} are not used")


@cache
def say_once(source: str, line: str) -> None:
    """Log a line on a table, once in a process."""
    log.warning("%s: %s", source, line)
