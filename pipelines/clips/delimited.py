"""Tables of text: CSV and its kin with any delimiter, plain lists of paths, Kaldi's ``wav.scp``."""

import codecs
import csv
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.columns import (
    DELIMITERS,
    PATH_KEYS,
    Columns,
    TableFormat,
    find_columns,
)
from ssast.pipelines.clips.entries import BLOCK_ROWS, Entries, Table
from ssast.pipelines.clips.folders import AUDIO_SUFFIXES, FFMPEG_SUFFIXES
from ssast.pipelines.clips.paths import absolute, resolve
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import csv_rows, marked_encoding, read_lines, told_encoding

SAMPLE_BYTES, SAMPLE_ROWS = 2**16, 20  # that a table is told by
LISTS = (".txt", ".lst", ".list")  # a path in each line, unless they look otherwise
SCP = ".scp"
NAMES = {",": "CSV", "\t": "TSV", ";": "CSV with ;", "|": "CSV with |"}
SOUNDS = AUDIO_SUFFIXES | FFMPEG_SUFFIXES
SEPARATOR = re.compile(r"sep=(.)\s*$")  # a first line for Excel
ARCHIVE = re.compile(r":\d+$")  # Kaldi: a place in an archive


def open_delimited(path: Path, table: TableFormat) -> Table:
    """Open a table of text; its rows are ``line 1``, ``line 2``, ...

    Raises:
        DataError: It is not told which column holds the clips, or a column is there twice; or
            while iterating: it is no such text, or a line has more or fewer columns.
        OSError: It cannot be read.
    """
    lines = _sample(path, table.encoding)
    if path.suffix.lower() == SCP:
        return _lines(path, table, "wav.scp", _scripted)
    skipped = 0
    if lines and (stated := SEPARATOR.match(lines[0])):
        table = table if table.delimiter else replace(table, delimiter=stated[1])
        lines, skipped = lines[1:], 1
    headed = _headed(path, table, lines)
    if headed is not None:
        delimiter, header = headed
        columns = find_columns(header, table, path)
        return _table(path, table, _dialect(delimiter, lines), header, columns, skipped + 1)
    if not skipped and _is_fairseq(lines):
        columns = find_columns(["1", "2"], _with_path(table, 0), path)
        made = _table(path, table, _dialect("\t", lines), ["1", "2"], columns, 1)
        return replace(made, form="fairseq's TSV", guessed=True, root=lines[0].strip())
    texts = [line.rstrip("\r\n") for line in lines]
    if not table.columns and _are_sounds(texts, path):
        return _lines(path, table, "list", _listed)
    found = _headless(path, table, lines, skipped)
    if found is not None:
        return found
    if path.suffix.lower() in LISTS and texts and _looks_like_sound(texts[0]):
        return _lines(path, table, "list", _listed)
    known = ", ".join(map(repr, PATH_KEYS[:5]))
    first = next(iter(_rows(lines, _delimiters(table)[0])), [])
    raise DataError(
        f"{path}: expected a header with {known}, ... or a column of audio files that exist, "
        f"found {first!s:.200}; data.columns={{wav: NAME}} names the column of the clips"
    )


def _headless(path: Path, table: TableFormat, lines: list[str], skipped: int) -> Table | None:
    """Return a table without header, if it has a column of audio files."""
    for delimiter in _delimiters(table):
        rows = _rows(lines, delimiter)
        if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
            continue
        header = [str(number) for number in range(1, len(rows[0]) + 1)]
        cells = zip(header, zip(*rows, strict=True), strict=True)
        named = table.columns.get("wav")
        place = named or next((name for name, names in cells if _are_sounds(names, path)), None)
        if place not in header:
            continue
        form = replace(table, columns={"wav": place, **table.columns})
        if len(header) == 2 and "labels" not in form.columns:
            (other,) = {*header} - {place}
            form = replace(form, columns={**form.columns, "labels": other})
        columns = find_columns(header, form, path)
        made = _table(path, table, _dialect(delimiter, lines), header, columns, skipped)
        return replace(made, form=f"{made.form} without header", guessed=True)
    return None


def _with_path(table: TableFormat, place: int) -> TableFormat:
    return replace(table, columns={"wav": str(place + 1), **table.columns})


def _delimiters(table: TableFormat) -> Sequence[str]:
    return DELIMITERS if table.delimiter is None else (table.delimiter,)


def _headed(path: Path, table: TableFormat, lines: list[str]) -> tuple[str, list[str]] | None:
    """Return the delimiter with which the first row names the paths, and its cells."""
    wanted = table.columns.get("wav", "").strip().lower()
    found: list[tuple[int, str, list[str]]] = []
    marks = _delimiters(table)
    if path.suffix.lower() != ".csv":
        marks = sorted(marks, key=lambda mark: mark != "\t")
    for mark in marks:
        header = next(iter(_rows(lines, mark)), [])
        names = {cell.strip().lower() for cell in header}
        if (wanted and wanted in names) or (not wanted and names & set(PATH_KEYS)):
            found.append((len(header), mark, header))
    if not found:
        return None
    _, mark, header = max(found, key=lambda one: one[0])
    return mark, [cell.strip() for cell in header]


def _is_fairseq(lines: list[str]) -> bool:
    """Return whether the first line is a folder, and the others are paths and numbers of frames."""
    rows = _rows(lines, "\t")
    return (
        len(rows) > 1
        and len(rows[0]) == 1
        and not _looks_like_sound(rows[0][0])
        and all(len(row) == 2 and row[1].strip().isdigit() for row in rows[1:])
    )


def _looks_like_sound(name: str) -> bool:
    return os.path.splitext(name.strip())[1].lower() in SOUNDS


def _are_sounds(names: Sequence[str], path: Path) -> bool:
    """Return whether all of these are files, or have the suffix of sounds and one is a file."""
    folder = absolute(path.parent)
    exist = [_exists(name, folder) for name in names if name.strip()]
    return bool(exist) and (
        all(exist) or (any(exist) and all(map(_looks_like_sound, filter(str.strip, names))))
    )


def _exists(name: str, folder: str) -> bool:
    try:
        return os.path.isfile(resolve(name, folder))
    except ValueError:
        return False


def _sample(path: Path, encoding: str | None) -> list[str]:
    """Return the first lines."""
    with open_regular(path) as file:
        data = file.read(SAMPLE_BYTES)
        whole = not file.read(1)
    codec = encoding or marked_encoding(data) or "utf-8"
    try:  # a character may be cut at the end
        text = codecs.getincrementaldecoder(codec)().decode(data, final=whole)
    except UnicodeError:  # what is wrong is said when all of it is read
        text = data.decode("cp1252", "replace")
    if "\0" in text:
        deque(read_lines(path, encoding), 0)  # says what is wrong
    lines = list(io.StringIO(text.replace("\0", "").removeprefix("\ufeff"), newline=""))
    lines = lines if whole or len(lines) == 1 else lines[:-1]
    return [line for line in lines if line.strip()][: SAMPLE_ROWS + 1]


def _rows(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """Return the rows of a sample, as far as they are CSV."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(lines, strict=True, **_dialect(delimiter, lines)):
            rows.append(row)
    except csv.Error:
        pass
    return rows[:SAMPLE_ROWS]


def _dialect(delimiter: str, lines: Sequence[str]) -> dict[str, Any]:
    """Return the settings of csv: cells may be quoted behind a blank, as in AudioSet's tables."""
    mark = re.escape(delimiter)
    behind = re.compile(rf'{mark} +"[^"]*" *({mark}|[\r\n]|$)')
    skipped = not delimiter.isspace() and any(map(behind.search, lines))
    return {"delimiter": delimiter, "skipinitialspace": skipped}


def _codec(path: Path, table: TableFormat) -> str | None:
    if table.encoding is not None:
        return table.encoding
    return told_encoding(path, "; data.encoding sets another")


def _table(
    path: Path,
    table: TableFormat,
    dialect: dict[str, Any],
    header: list[str],
    columns: Columns,
    skipped: int,
) -> Table:
    """Return a table with cells.

    Args:
        path: The file.
        table: What is set.
        dialect: Settings of csv.
        header: Names of the columns.
        columns: Those that are used.
        skipped: Rows before the first clip.
    """
    delimiter = dialect["delimiter"]
    used = [(name, header.index(name)) for name in columns.used]
    sound = dict(used).get(columns.wav or "")

    def entries() -> Iterator[Entries]:
        codec = _codec(path, table)
        settings = dict(dialect)
        if delimiter == "\t" and not _is_quoted(path, codec, len(header)):
            settings["quoting"] = csv.QUOTE_NONE
        rows = islice(csv_rows(_lines_of(path, codec), path, **settings), skipped, None)
        while block := list(islice(rows, BLOCK_ROWS)):
            for line, cells in block:
                if _swallows(cells, delimiter, sound):
                    raise DataError(
                        f"{path}: line {line}: a quote that begins here ends in a later row: "
                        "expected a cell that holds quotes to be quoted, and they doubled"
                    )
                if len(cells) != len(header):
                    many = len(cells) > len(header)
                    mark = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
                    hint = f"; a cell that holds {mark} is quoted" if many else ""
                    raise DataError(
                        f"{path}: line {line}: expected {len(header)} columns, found "
                        f"{len(cells)}{hint}"
                    )
            yield Entries(
                [{name: cells[place] for name, place in used} for _, cells in block],
                [line for line, _ in block],
                "line",
            )

    return Table(columns, entries(), NAMES.get(delimiter, f"CSV with {delimiter}"))


def _lines_of(path: Path, codec: str | None) -> Iterator[str]:
    """Return the lines, without a byte order mark before them."""
    lines = read_lines(path, codec)
    for first in lines:
        yield first.removeprefix("\ufeff")
        yield from lines


def _is_quoted(path: Path, codec: str | None, count: int) -> bool:
    """Return whether quotes in a TSV enclose cells: Common Voice's sentences hold them as text."""
    if not any('"' in line for line in _lines_of(path, codec)):
        return False
    try:
        rows = csv.reader(_lines_of(path, codec), delimiter="\t", strict=True)
        return all(len(row) == count and not _swallows(row, "\t") for row in rows if any(row))
    except csv.Error:
        return False


def _swallows(cells: list[str], delimiter: str, place: int | None = None) -> bool:
    """Return whether a row may be several, which quotes that are text made one of.

    Then each of its lines has as many cells as the row; and a sound in the column ``place``, if
    that is given: sentences hold commas.
    """
    if len(cells) < 2 or "\n" not in "".join(cells):
        return False
    rows = [line.split(delimiter) for line in delimiter.join(cells).splitlines()]
    return len(rows) > 1 and all(
        len(row) == len(cells) and (place is None or _looks_like_sound(row[place])) for row in rows
    )


def _lines(path: Path, table: TableFormat, form: str, read: Callable[[str, str], str]) -> Table:
    """Return a table with a path in each line.

    Args:
        path: The file.
        table: What is set; it has no columns to choose from.
        form: Name of the form.
        read: Returns the path in a line.
    """
    if table.columns.keys() - {"wav"}:
        raise DataError(f"{path}: data.columns: expected a table with columns, found a {form}")
    columns = Columns("path", set_by_hand=frozenset({"wav"}))

    def entries() -> Iterator[Entries]:
        numbered = (
            (number, line.rstrip("\r\n"))
            for number, line in enumerate(_lines_of(path, _codec(path, table)), 1)
            if line.strip()
        )
        while block := list(islice(numbered, BLOCK_ROWS)):
            names = [{"path": read(f"{path}: line {n}", line)} for n, line in block]
            yield Entries(names, [number for number, _ in block], "line")

    return Table(columns, entries(), form)


def _listed(where: str, line: str) -> str:
    return line


def _scripted(where: str, line: str) -> str:
    """Return the path in a line of ``wav.scp``: ``utterance path``."""
    _, _, path = line.strip().partition(line.split(None, 1)[0])
    path = path.strip()
    if not path:
        raise DataError(f"{where}: expected an utterance and a path, found {line!r:.80}")
    if path.endswith("|"):
        raise DataError(f"{where}: a command, which is not run: write its output to a file")
    if ARCHIVE.search(path):
        raise DataError(f"{where}: a place in a Kaldi archive: expected the path of a sound")
    return path
