"""The entries of JSON and CSV manifests, many at a time, without holding a whole file in memory."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.segment import TIME_KEYS
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import csv_rows, parse_json, read_lines, read_text, shown

PATH_KEYS = ("wav", "path")
PREPARED_KEY, CLIP_KEY = "prepared", "clip"
LABEL_KEYS = ("labels", "label")  # several with commas between them, or one
BLOCK_BYTES, BLOCK_ROWS = 2**18, 2**10
HEAD = re.compile(
    rb'\s*\{\s*(?:"%s"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*)?"data"\s*:\s*\[' % PREPARED_KEY.encode()
)
TAIL = re.compile(rb"\}\s*\]\s*\}\s*\Z")  # of the last entry, of the list, of the file


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of a manifest.

    Attributes:
        columns: Columns of each entry.
        numbers: Number of each entry, or the line in which it begins.
        unit: ``entry`` or ``line``.
    """

    columns: list[dict[str, Any]]
    numbers: Sequence[int]
    unit: str

    def where(self, row: int) -> str:
        """Return the location of an entry, for messages."""
        return f"{self.unit} {self.numbers[row]}"


def json_entries(path: Path) -> tuple[dict[str, Any], Iterator[Entries]]:
    """Read ``{"data": [...], ...}``; the entries are ``entry 0``, ``entry 1``, ...

    Returns:
        What there is besides ``data``, and the entries.

    Raises:
        DataError: Not JSON, not of this form, or (while iterating) an entry is not an object.
        OSError: It cannot be read.
    """
    head = _head(path)
    if head is None:
        besides = json_content(path)
        blocks = _parts(besides.pop("data"))
    else:
        besides, start = head
        blocks = _blocks(path, start)
    return besides, _numbered(path, blocks, CLIP_KEY if PREPARED_KEY in besides else PATH_KEYS[0])


def _numbered(path: Path, blocks: Iterable[list[Any]], key: str) -> Iterator[Entries]:
    done = 0
    for entries in blocks:
        for number, entry in enumerate(entries, done):
            if not isinstance(entry, dict):
                raise DataError(
                    f'{path}: entry {number}: expected {{"{key}": ...}}, found {shown(entry)}'
                )
        yield Entries(entries, range(done, done + len(entries)), "entry")
        done += len(entries)


def _head(path: Path) -> tuple[dict[str, Any], int] | None:
    """Return what is before the list, and where it begins; None for a file of another form."""
    with open_regular(path) as file:
        head = HEAD.match(file.read(BLOCK_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - BLOCK_BYTES))
        if head is None or not TAIL.search(file.read()):
            return None
    try:
        return {PREPARED_KEY: parse_json(head[1].decode())} if head[1] else {}, head.end()
    except ValueError:
        return None


def _blocks(path: Path, start: int) -> Iterator[list[Any]]:
    """Decode the list of a JSON file block by block.

    What is between the beginning of an entry and a ``},`` is one or more whole entries if, in
    brackets, it is JSON. Where that fails, the file is decoded as a whole, also to say what is
    wrong with it.
    """
    done = 0
    with open_regular(path) as file:
        file.seek(start)
        data = file.read(BLOCK_BYTES)
        while True:
            more = file.read(BLOCK_BYTES)
            tail = None if more else TAIL.search(data)
            cut = data.rfind(b"},") + 1 if more else tail.start() + 1 if tail else 0
            try:
                entries = parse_json(f"[{data[:cut].decode()}]")
            except ValueError:
                break
            yield entries
            done += len(entries)
            if not more:
                return
            data = data[cut + 1 :] + more
    yield from _parts(json_content(path)["data"][done:])


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entries), BLOCK_ROWS):
        yield entries[start : start + BLOCK_ROWS]


def json_content(path: Path) -> dict[str, Any]:
    """Read ``{"data": [...], ...}`` as a whole.

    Raises:
        DataError: Not JSON, or not of this form.
        OSError: It cannot be read.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from error
    except ValueError as error:  # a number too long, lists too deep
        raise DataError(f"{path}: not JSON of a manifest: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    return content


def csv_entries(path: Path) -> Iterator[Entries]:
    """Read the rows of a CSV manifest, which are ``line 2``, ``line 3``, ...

    Raises:
        DataError: Not CSV, the header names no path column or one twice, or a line has more or
            fewer columns.
        OSError: It cannot be read.
    """
    rows = csv_rows(read_lines(path), path)
    header = [name.strip().lower() for name in next(rows, (1, []))[1]]
    if not set(header) & set(PATH_KEYS):
        raise DataError(f"{path}: expected a header with 'wav' or 'path', found {header!s:.200}")
    keys = PATH_KEYS + LABEL_KEYS + TIME_KEYS
    for name in keys:
        if header.count(name) > 1:
            raise DataError(f"{path}: expected one column {name!r}, found {header.count(name)}")
    used = [(name, header.index(name)) for name in keys if name in header]
    while block := list(islice(rows, BLOCK_ROWS)):
        for line, cells in block:
            if len(cells) != len(header):
                hint = "; a cell that holds a comma is quoted" if len(cells) > len(header) else ""
                raise DataError(
                    f"{path}: line {line}: expected {len(header)} columns, found {len(cells)}{hint}"
                )
        columns = [{name: cells[place] for name, place in used} for _, cells in block]
        yield Entries(columns, [line for line, _ in block], "line")
