"""Sounds in Parquet files, as ``datasets`` saves them and the Hugging Face hub serves them.

A row group is read from its start, a few rows at a time: what reads the rows in order reads each
group once, and no more than :data:`AT_ONCE` sounds are in memory.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ssast.pipelines.audio.parts import Cell
from ssast.pipelines.clips.columns import PLAIN, Columns, TableFormat, find_columns, say_once
from ssast.pipelines.clips.labels import is_name, label_form, parse_labels
from ssast.pipelines.clips.parquet import parquet_file, sound_column
from ssast.pipelines.errors import DataError, UnusableError
from ssast.pipelines.text import one_line, parse_json, shown

AT_ONCE = 16  # rows
LARGEST = 2**31  # bytes that a group may state for each row of a batch
Names = tuple[str, ...]
Row = tuple[str, Cell, int, Names]  # name, where its sound is, about its bytes, labels


def has_sounds(path: Path) -> bool:
    """Return whether a file is a Parquet file with a column of sounds.

    Raises:
        DataError: It is no Parquet file, or pyarrow is not installed.
        OSError: It cannot be read.
    """
    return sound_column(parquet_file(path).schema_arrow) is not None


def parquet_rows(path: Path, table: TableFormat = PLAIN) -> tuple[list[Row], bool]:
    """Return the rows of a Parquet file with sounds, and whether they have labels.

    Names of classes are taken from the features that ``datasets`` writes into the schema.

    Raises:
        DataError: It cannot be read, or a label is none of the classes.
        OSError: It cannot be read.
    """
    file = parquet_file(path)
    schema = file.schema_arrow
    column = sound_column(schema)
    assert column is not None
    others = [name for name in schema.names if name != column]
    given = {key: name for key, name in table.columns.items() if key == "labels"}
    label = find_columns(others, TableFormat(given), path).labels
    read = Columns(column, label, unused=tuple(name for name in others if name != label))
    say_once(str(path.with_name("*.parquet")), f"Parquet: {read.describe()}")
    classes = None if label is None else _classes(schema, label)
    form = label_form(label, table.label_separator)
    fields = {field.name for field in schema.field(column).type}
    wanted = [f"{column}.path"] * ("path" in fields) + ([label] if label is not None else [])
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    stated, num_bytes = sum(facts.num_rows for facts in groups), os.stat(path).st_size
    if stated > num_bytes:
        raise DataError(f"{path}: states {stated} rows of sounds in {num_bytes} bytes")
    rows: list[Row] = []
    for group, facts in enumerate(groups):
        size = facts.total_byte_size // max(facts.num_rows, 1)
        columns = _columns(path, file, group, wanted, facts.num_rows)
        for number in range(facts.num_rows):
            sound = None if "path" not in fields else columns[column][number].as_py()
            inside = PurePosixPath(str((sound or {}).get("path") or "sound")).name
            labels: Names = ()
            if label is not None:
                given = columns[label][number].as_py()
                labels = _labels(f"{path}: row {len(rows)}", given, classes, form)
            name = f"{len(rows):08d}_{inside}"
            rows.append((name, Cell(path, column, group, number), size, labels))
    return rows, label is not None


def _columns(path: Path, file: Any, group: int, wanted: list[str], num_rows: int) -> Any:
    """Return some columns of a group, None for none of them.

    Raises:
        DataError: They are damaged, or have another number of rows than is stated.
    """
    import pyarrow as pa

    if not wanted:
        return None
    try:
        columns = file.read_row_group(group, columns=wanted)
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path}: row group {group}: {one_line(error):.200}") from error
    if len(columns) != num_rows:
        raise DataError(f"{path}: row group {group}: states {num_rows} rows, has {len(columns)}")
    return columns


def _classes(schema: Any, label: str) -> list[str] | None:
    """Return the names of the classes of a column, None if it is not of ClassLabel."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        feature = parse_json(schema.metadata[b"huggingface"])["info"]["features"][label]
        if isinstance(feature, list):
            [feature] = feature
        feature = feature.get("feature", feature)
        names = feature["names"]
        if isinstance(names, list) and all(map(is_name, names)):
            return names
    return None


def _labels(where: str, given: Any, classes: list[str] | None, form: Mapping[str, Any]) -> Names:
    """Return the labels in a cell: a name, several in a text, a number, or a list of them.

    Raises:
        DataError: They are something else, or no number of a class.
    """
    if isinstance(given, str):
        try:
            return parse_labels(given, **form)
        except ValueError as error:
            raise DataError(f"{where}: {error}, found {shown(given)}") from error
    listed = [] if given is None else given if isinstance(given, list) else [given]
    names: list[str] = []
    for value in listed:
        if type(value) is int and classes is not None:
            if value == -1:  # unknown, as in the test sets of the hub
                continue
            if not 0 <= value < len(classes):
                raise DataError(f"{where}: class {value}, expected 0 to {len(classes) - 1}")
            names.append(classes[value])
        elif isinstance(value, str) or type(value) is int:
            names += [str(value)] if str(value).strip() else []
        else:
            raise DataError(f"{where}: expected a label, found {shown(value)}")
    if not all(map(is_name, names)):
        raise DataError(f"{where}: expected labels that are text")
    return tuple(names)


class _Reader:
    """The rows of one group, read forwards."""

    def __init__(self, cell: Cell) -> None:
        self.where = (cell.path, cell.column, cell.group, os.stat(cell.path).st_mtime_ns)
        file = parquet_file(cell.path)
        if file.metadata.row_group(cell.group).total_byte_size > LARGEST * AT_ONCE:
            raise UnusableError("is in a group of rows that is too large")
        self._sounds = self._read(file, cell)
        self.next = 0

    @staticmethod
    def _read(file: Any, cell: Cell) -> Iterator[Any]:
        columns = [f"{cell.column}.bytes"]
        for batch in file.iter_batches(AT_ONCE, row_groups=[cell.group], columns=columns):
            yield from batch.column(0).field("bytes")

    def sound(self, row: int) -> Any:
        while True:
            found = next(self._sounds)
            self.next += 1
            if self.next > row:
                return found.as_py()


_readers = threading.local()  # the group that a thread reads


def read_cell(cell: Cell) -> bytes:
    """Return the sound in a cell.

    Raises:
        UnusableError: It holds none, or the file is damaged or cannot be read.
    """
    import pyarrow as pa

    try:
        reader = getattr(_readers, "last", None)
        where = (cell.path, cell.column, cell.group, os.stat(cell.path).st_mtime_ns)
        if reader is None or reader.where != where or reader.next > cell.row:
            _readers.last = None
            _readers.last = reader = _Reader(cell)
        data = reader.sound(cell.row)
    except (DataError, StopIteration, pa.ArrowException, OSError, ValueError) as error:
        _readers.last = None
        raise UnusableError(f"cannot be read: {one_line(error):.200}") from error
    if not data:
        raise UnusableError("holds no bytes of a sound, perhaps a path alone")
    return bytes(data)
