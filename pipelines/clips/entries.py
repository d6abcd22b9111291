"""The entries of JSON and JSON Lines, many at a time, without holding a whole file in memory."""

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ssast.pipelines.clips.columns import PATH_KEYS, Columns
from ssast.pipelines.errors import DataError
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import parse_json, read_lines, read_text, shown

PREPARED_KEY, CLIP_KEY = "prepared", "clip"
BLOCK_BYTES, BLOCK_ROWS = 2**18, 2**10
HEAD = re.compile(
    rb'\s*(?:(\{)\s*(?:"%s"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*)?"data"\s*:\s*)?\['
    % PREPARED_KEY.encode()
)
TAILS = {  # of the last entry, of the list, of the file
    True: re.compile(rb"\}\s*\]\s*\}\s*\Z"),
    False: re.compile(rb"\}\s*\]\s*\Z"),
}
LINE_BYTES = 2**20  # of a first line that tells JSON Lines from JSON


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


@dataclass(frozen=True)
class Table:
    """A table of clips that has been opened.

    Attributes:
        columns: Its columns.
        entries: Its rows, to be read once.
        form: Name of its format.
        published: Whether it is the published JSON, where commas separate labels.
        besides: What a JSON file holds besides the list.
        guessed: Whether its columns are told by what is in them.
        root: Folder that paths are relative to; None: that of the table.
    """

    columns: Columns
    entries: Iterator[Entries]
    form: str
    published: bool = False
    besides: dict[str, Any] = field(default_factory=dict)
    guessed: bool = False
    root: str | None = None

    def is_plain(self) -> bool:
        """Return whether its columns have the usual names and all of them are read."""
        names = {self.columns.wav, self.columns.labels}
        usual = names <= {"wav", "path", CLIP_KEY, "labels", "label", None}
        return usual and not self.columns.unused and not self.guessed


def json_entries(
    path: Path, codec: str | None = None
) -> tuple[dict[str, Any] | None, Iterator[Entries]]:
    """Read ``{"data": [...], ...}`` or a bare list; the entries are ``entry 0``, ``entry 1``, ...

    The entries of a bare list may be paths alone.

    Args:
        path: The file.
        codec: Encoding of the text; None: UTF-8, or what its byte order mark says.

    Returns:
        What there is besides ``data``, None of a bare list; and the entries.

    Raises:
        DataError: Not JSON, not of this form, or (while iterating) an entry is not an object.
        OSError: It cannot be read.
    """
    head = _head(path) if codec is None else None
    if head is None:
        content = json_content(path, codec)
        if isinstance(content, list):
            besides, blocks = None, _parts(content)
        else:
            besides, blocks = content, _parts(content.pop("data"))
    else:
        besides, start = head
        blocks = _blocks(path, start, besides is not None)
    return besides, _numbered(path, blocks, besides)


def _numbered(
    path: Path, blocks: Iterable[list[Any]], besides: dict[str, Any] | None
) -> Iterator[Entries]:
    key = CLIP_KEY if besides is not None and PREPARED_KEY in besides else "wav"
    done = 0
    for block in blocks:
        entries = block
        if besides is None and any(isinstance(entry, str) for entry in block):
            entries = [{key: entry} if isinstance(entry, str) else entry for entry in block]
        if set(map(type, entries)) - {dict}:
            number, entry = next((n, e) for n, e in enumerate(entries) if type(e) is not dict)
            raise DataError(
                f'{path}: entry {done + number}: expected {{"{key}": ...}}, found {shown(entry)}'
            )
        yield Entries(entries, range(done, done + len(entries)), "entry")
        done += len(entries)


def are_json_lines(path: Path, codec: str | None = None) -> bool:
    """Return whether the first line is an entry of its own, as NeMo writes its manifests.

    Raises:
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(LINE_BYTES).removeprefix(b"\xef\xbb\xbf")
    # Replaced: what is wrong in a later line is said when it is read.
    decoder = codecs.getincrementaldecoder(codec or "utf-8")("replace")
    line = decoder.decode(data).lstrip().partition("\n")[0]
    if not line.startswith("{"):
        return False
    try:
        first = parse_json(line)
    except ValueError:
        return False
    return isinstance(first, dict) and (
        "data" not in first or not first.keys().isdisjoint(PATH_KEYS)
    )


def json_lines(path: Path, codec: str | None = None) -> Iterator[Entries]:
    """Read an object in each line; the entries are ``line 1``, ``line 2``, ...

    Raises:
        DataError: A line is no object of JSON.
        OSError: It cannot be read.
    """
    lines = ((n, line) for n, line in enumerate(read_lines(path, codec), 1) if line.strip())
    while block := list(islice(lines, BLOCK_ROWS)):
        try:
            entries = parse_json(f"[{','.join(line for _, line in block)}]")
        except ValueError:
            entries = []
        if len(entries) != len(block) or not all(isinstance(entry, dict) for entry in entries):
            entries = [_object(f"{path}: line {number}", line) for number, line in block]
        yield Entries(entries, [number for number, _ in block], "line")


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON: {reason}") from error
    if not isinstance(entry, dict):
        raise DataError(f'{where}: expected {{"wav": ...}}, found {shown(entry)}')
    return entry


def _head(path: Path) -> tuple[dict[str, Any] | None, int] | None:
    """Return what is before the list, and where it begins; None for a file of another form."""
    with open_regular(path) as file:
        head = HEAD.match(file.read(BLOCK_BYTES))
        file.seek(max(0, os.fstat(file.fileno()).st_size - BLOCK_BYTES))
        if head is None or not TAILS[head[1] is not None].search(file.read()):
            return None
    if head[1] is None:
        return None, head.end()
    try:
        return {PREPARED_KEY: parse_json(head[2].decode())} if head[2] else {}, head.end()
    except ValueError:
        return None


def _blocks(path: Path, start: int, in_object: bool) -> Iterator[list[Any]]:
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
            tail = None if more else TAILS[in_object].search(data)
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
    content = json_content(path)
    yield from _parts((content if isinstance(content, list) else content["data"])[done:])


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(entries), BLOCK_ROWS):
        yield entries[start : start + BLOCK_ROWS]


def json_content(path: Path, codec: str | None = None) -> dict[str, Any] | list[Any]:
    """Read ``{"data": [...], ...}`` or a list as a whole.

    Raises:
        DataError: Not JSON, or not of this form.
        OSError: It cannot be read.
    """
    text = read_text(path) if codec is None else "".join(read_lines(path, codec))
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error.msg} in line {error.lineno}") from error
    except ValueError as error:  # a number too long, lists too deep
        raise DataError(f"{path}: not JSON of a manifest: {error}") from error
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f'{path}: expected {{"data": [{{"wav": ..., "labels": ...}}, ...]}}')
    return content
