"""A data set as its publishers describe it: the clips of each split, and the classes.

Also how their own files are read: lists and tables, with the line in every complaint.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssast.pipelines.errors import DataError
from ssast.pipelines.text import csv_rows, read_text

Weigh = Callable[[Sequence[Sequence[str]]], list[float]]


class Listed(NamedTuple):
    """A clip that belongs to a split.

    Attributes:
        name: Name that the publishers use.
        path: Absolute; relative to the output folder if it is one of :attr:`Dataset.made`; None if
            the user's copy does not have it.
        labels: Labels out of :attr:`Dataset.classes`; none where the set is not labelled.
        span: Begin and duration in s of a clip that is a segment of the file.
    """

    name: str
    path: str | None
    labels: tuple[str, ...] = ()
    span: tuple[float, float] | None = None


class Cut(NamedTuple):
    """A clip that is not a file yet.

    Attributes:
        samples: [S] or [S, channels] int16.
        rate_hz: Sampling rate.
    """

    samples: np.ndarray
    rate_hz: int


@dataclass(frozen=True)
class Dataset:
    """Split, classes and weights of a data set, as they are written.

    Attributes:
        splits: The clips of each split, in the order of the manifest.
        classes: (label, name for people) in the order of the classes; none if not labelled.
        weigh: From the labels of a split's clips to their sampling weights, where it has some.
        made: Clips to be written, by their path in the output folder.
        notes: Lines that say what was left out, and why.
    """

    splits: Mapping[str, Sequence[Listed]]
    classes: Sequence[tuple[str, str]] = ()
    weigh: Mapping[str, Weigh] = field(default_factory=dict)
    made: Mapping[str, Cut] = field(default_factory=dict)
    notes: Sequence[str] = ()


def root_with(source: Path, marker: str, *inside: str) -> Path:
    """Find the folder that holds ``marker``: the source itself, or a folder in it.

    Args:
        source: Path that the user gave.
        marker: A file or folder that the data set always has.
        inside: Name of the top folder in the data set's archive.

    Raises:
        DataError: There is none.
    """
    for folder in (source, *(source / name for name in inside)):
        if (folder / marker).exists():
            return folder
    try:
        names = sorted(os.listdir(source))
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise DataError(f"{source}: expected a folder with {marker}, found {found or 'nothing'}")


def existing(*candidates: str | Path) -> str | None:
    """Return the first of these paths that is a file."""
    return next((os.fspath(path) for path in candidates if os.path.isfile(path)), None)


def listing(folder: Path, suffix: str) -> list[str]:
    """List the files in a folder with this ending, sorted, without hidden ones.

    Raises:
        DataError: No such folder.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: expected this folder of the data set, found none") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))


def lines(
    path: Path, *, encoding: str | None = None, comment: str | None = None, tabs: bool = False
) -> Iterator[tuple[str, str]]:
    """Read the lines of a text file that are not blank.

    Args:
        path: The file.
        encoding: Encoding of the text; None: UTF-8, or what its byte order mark says.
        comment: Lines that begin so are passed over.
        tabs: Keep tabs at the begin and the end: the cells beside them are empty.

    Yields:
        (file and line number for messages, text without surrounding blanks).

    Raises:
        DataError: It is missing, cannot be read, or is not text.
    """
    for number, line in enumerate(io.StringIO(_text(path, encoding), newline=None), 1):
        text = line.strip(" \r\n" if tabs else None)
        if text.strip() and not (comment and text.startswith(comment)):
            yield f"{path}: line {number}", text


def _text(path: Path, encoding: str | None = None) -> str:
    try:
        return read_text(path) if encoding is None else path.read_text(encoding)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected this file of the data set, found none") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not {encoding} text: byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def table(
    path: Path, columns: Sequence[str], *, headed: bool = True, comment: str | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Read the rows of a CSV file.

    Args:
        path: The file.
        columns: Those that are needed; all there are, and in this order, if it has no header.
        headed: Whether its first line names the columns.
        comment: Lines that begin so are passed over.

    Yields:
        (file and line number for messages, cells by column).

    Raises:
        DataError: It cannot be read, a column is missing, or a row has more or fewer cells.
    """
    names = None if headed else list(columns)
    # Published tables have blanks at the ends of lines, and comments that are no CSV.
    texts = (line.strip() for line in io.StringIO(_text(path), newline=None))
    text = "\n".join("" if comment and line.startswith(comment) else line for line in texts)
    for number, cells in csv_rows(text, path, skipinitialspace=True):
        place, line = f"{path}: line {number}", ",".join(cells)
        if names is None:
            if not set(columns) <= set(cells):
                wanted = ",".join(columns)
                raise DataError(f"{place}: expected a header with {wanted}, found {line!r:.80}")
            names = cells
        elif len(cells) != len(names):
            wanted = ",".join(names)
            raise DataError(f"{place}: expected {len(names)} columns {wanted}, found {line!r:.80}")
        else:
            yield place, dict(zip(names, cells, strict=True))


def class_table(
    path: Path, columns: Sequence[str] = ("index", "mid", "display_name"), *, headed: bool = True
) -> dict[str, str]:
    """Read the table of the classes.

    Args:
        path: The file.
        columns: Columns as in :func:`table`; one is ``index``, one is ``mid``, and one is the name.
        headed: See :func:`table`.

    Returns:
        Names by label (mid), in the order of the indices.

    Raises:
        DataError: It cannot be read, is empty, skips an index or has a label twice.
    """
    (name_column,) = set(columns) - {"index", "mid"}
    names: dict[str, str] = {}
    for place, row in table(path, columns, headed=headed):
        if row["index"] != str(len(names)):
            raise DataError(f"{place}: expected index {len(names)}, found {row['index']!r}")
        if row["mid"] in names:
            raise DataError(f"{place}: class {row['mid']} is listed already")
        names[row["mid"]] = row[name_column]
    if not names:
        raise DataError(f"{path}: expected a table of classes, found no rows")
    return names


def labels_of(text: str, classes: Mapping[str, str], place: str) -> tuple[str, ...]:
    """Split a cell of labels.

    Args:
        text: Labels with commas between them.
        classes: The known labels.
        place: For the message.

    Raises:
        DataError: There are none, or one is unknown.
    """
    labels = tuple(label.strip() for label in text.split(","))
    for label in labels:
        if label not in classes:
            raise DataError(
                f"{place}: expected labels of the {len(classes)} classes, found {label!r}"
            )
    return labels


def once(seen: dict[str, str], name: str, place: str) -> None:
    """Record a clip, so that none is listed twice, nor in two splits.

    Args:
        seen: Position of each listed clip in its table; this one is added.
        name: The clip.
        place: Position of this clip in its table.

    Raises:
        DataError: It was listed before.
    """
    before = seen.setdefault(name, place)
    if before != place:
        raise DataError(f"{place}: {name} is listed already at {before}")
