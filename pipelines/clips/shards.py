"""Prepared clips in plain tar shards: where each clip lies, and its bytes.

A prepared folder holds::

    shards/00000.tar ...     the clips, as files of their own in plain tar archives
    shards/00000.jsonl ...   contents and origin of each shard, see :class:`Sidecar`
    index.npy                [n, 3] int64: shard, offset in bytes, size in bytes of each clip
    recordings.npy           [n] int64: the number of the recording that each clip was cut from
    labels.json              {"names": [...], "clips": [[0, 2], ...]}, if the source has labels
    rejected.jsonl           {"name": ..., "reason": ...} of each recording that cannot be used
    wrong_lengths.jsonl      {"name", "stated_s", "found_s"} of each recording whose header states
                             another length; it was read to its end
    report.json              counts and settings; written last

The index is memory-mapped, so opening millions of clips takes neither time nor memory.
"""

import contextlib
import copy
import hashlib
import io
import math
import os
import tarfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssast.pipelines.clips.labels import is_name
from ssast.pipelines.clips.remote import as_path, fetched, is_url, read_range
from ssast.pipelines.clips.segment import Segment
from ssast.pipelines.clips.shared import Identity, state_of
from ssast.pipelines.clips.sidecar import BLOCK, Sidecar, read_small
from ssast.pipelines.errors import DataError, read_error
from ssast.pipelines.files import open_regular
from ssast.pipelines.text import one_line, parse_json

SHARD, SIDECAR = "shards/{:05d}.tar", "shards/{:05d}.jsonl"
INDEX, RECORDINGS, LABELS, REPORT = "index.npy", "recordings.npy", "labels.json", "report.json"
REJECTED, WRONG_LENGTHS = "rejected.jsonl", "wrong_lengths.jsonl"
OVERFLOWS = "overflows.jsonl"


def member_name(header: bytes, size: int) -> str | None:
    """Return the name in the header of a tar member.

    Args:
        header: The 512 bytes before the member.
        size: Expected size of the member in bytes.

    Returns:
        The name; None if these bytes are no header, or that of a member of another size.
    """
    if header[257:263] == b"ustar\0" and header[124:136] == b"%011o\0" % size:  # as we write it
        return (
            header[:100].rstrip(b"\0").decode("ascii", "replace") if len(header) == BLOCK else None
        )
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return member.name if member.size == size and member.isreg() else None


@dataclass(frozen=True, slots=True)
class ShardClip:
    """A clip in a shard.

    Attributes:
        path: Path or URL of the shard.
        offset: Offset of the clip's file in the shard, in bytes.
        size: Size of that file in bytes.
    """

    path: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def name(self) -> str:
        """Name of the clip: from the tar header, else from the sidecar, else its offset."""
        try:
            name = member_name(self.header(), self.size)
            if name is not None:
                return name
        except (OSError, OverflowError):
            pass  # the sidecar has the name as well
        try:
            clips = Sidecar.read(as_path(self.path).with_suffix(".jsonl")).clips
        except (OSError, DataError):
            clips = []
        names = (clip["file"] for clip in clips if clip["offset"] == self.offset)
        return next(names, f"clip at byte {self.offset}")

    def header(self) -> bytes:
        """Read the tar header before the clip.

        Raises:
            OSError: The shard cannot be opened or read.
        """
        start = max(0, self.offset - BLOCK)
        if is_url(self.path):
            return read_range(self.path, start, start + BLOCK)
        with open_regular(self.path) as file:
            return os.pread(file.fileno(), BLOCK, start)

    def read(self) -> bytes:
        """Read the file of the clip.

        Raises:
            OSError: The shard cannot be opened or read.
            DataError: The shard is shorter than when it was prepared, or holds something else.
        """
        if is_url(self.path):
            start, end = self.offset - BLOCK, self.offset + self.size
            data = read_range(self.path, start, end)
            size = start + len(data) if len(data) < end - start else end
        else:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                data = b""
                if BLOCK <= self.offset < self.offset + self.size <= size:
                    data = os.pread(file.fileno(), BLOCK + self.size, self.offset - BLOCK)
        if not BLOCK <= self.offset < self.offset + self.size <= size:
            raise DataError(
                f"{self}: the shard is truncated: expected {self.size} bytes at "
                f"{self.offset}, found a shard of {size} bytes"
            )
        if member_name(data[:BLOCK], self.size) is None or len(data) != BLOCK + self.size:
            raise DataError(f"{self}: the shard was overwritten: this clip is not where it was")
        return data[BLOCK:]


def header_problem(clip: ShardClip, name: str) -> str | None:
    """Check the tar header of a clip with Python's ``tarfile``.

    Args:
        clip: The clip.
        name: Its expected name.

    Returns:
        What is wrong with the header; None if nothing is.

    Raises:
        OSError: The shard cannot be read.
    """
    try:
        member = tarfile.TarInfo.frombuf(clip.header(), "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        return f"no tar header before byte {clip.offset}: {error}"
    if (member.name, member.size, member.isreg()) != (name, clip.size, True):
        return f"the tar header says {member.size} bytes of {member.name}, expected {clip.size}"
    return None


class ShardIndex(Sequence[ShardClip]):
    """The clips of a prepared folder, as a sequence that is not held in memory.

    Args:
        folder: The prepared folder.
        rows: Rows of the index, [n] integers; None for all of them.

    Raises:
        DataError: The index cannot be read, or has another form.
    """

    def __init__(self, folder: Path, rows: np.ndarray | None = None) -> None:
        self.folder, self.rows = folder, rows
        self._index = _load_array(folder / INDEX, 2)
        if self._index.shape[1] != 3:
            raise DataError(f"{folder / INDEX}: expected 3 columns, found {self._index.shape[1]}")
        self._shard = str((folder if is_url(folder) else folder.absolute()) / SHARD)

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._index if self.rows is None else self.rows)

    @overload
    def __getitem__(self, row: int) -> ShardClip: ...

    @overload
    def __getitem__(self, row: slice) -> "ShardIndex": ...

    def __getitem__(self, row: int | slice) -> "ShardClip | ShardIndex":
        """Return a clip, or some of them."""
        if isinstance(row, slice):
            return self.subset(np.arange(len(self))[row])
        shard, offset, size = self._index[row if self.rows is None else self.rows[row]].tolist()
        return ShardClip(self._shard.format(shard), offset, size)

    @property
    def identity(self) -> Identity | None:
        """What the clips and their recordings were read from; None for some of the clips.

        Also None where the rule of :func:`~.holdout.hold_out_clips` depends on more than these:
        for one recording alone, and for a folder behind a URL.
        """
        if self.rows is not None or is_url(self.folder) or not len(self):
            return None
        recordings = self.recordings()
        if recordings[0] == recordings[-1]:
            return None
        files = [self.folder / INDEX, self.folder / RECORDINGS]
        try:
            state = state_of(*files)
        except OSError:
            return None
        return None if state is None else (("shards", os.path.realpath(self.folder)), state)

    def table(self) -> np.ndarray:
        """Return shard, offset and size of each clip, [n, 3] int64."""
        return self._index[:] if self.rows is None else self._index[self.rows]

    def subset(self, rows: np.ndarray) -> "ShardIndex":
        """Return some of the clips.

        Args:
            rows: Rows of this sequence, [n] integers.
        """
        part = copy.copy(self)  # of the same index, which may have been fetched
        part.rows = rows if self.rows is None else self.rows[rows]
        return part

    def recordings(self) -> np.ndarray:
        """Return the number of the recording that each clip was cut from, [n] int64.

        Raises:
            DataError: The list cannot be read, or is of another index.
        """
        numbers = _load_array(self.folder / RECORDINGS, 1)
        if len(numbers) != len(self._index):
            raise DataError(
                f"{self.folder / RECORDINGS}: expected {len(self._index)} rows as in {INDEX}, "
                f"found {len(numbers)}"
            )
        return numbers[:] if self.rows is None else numbers[self.rows]

    def overlapping(self) -> bool:
        """Return whether clips of one recording may have samples in common.

        Raises:
            DataError: The report cannot be read.
        """
        hop_s, clip_s = (self._report("settings", "recipe", key) for key in ("hop_s", "clip_s"))
        if not isinstance(hop_s, int | float | None) or not isinstance(clip_s, int | float):
            raise DataError(f"{self.folder / REPORT}: damaged: prepare the data again")
        return (hop_s or clip_s) < clip_s

    def channel(self) -> str:
        """Return which channel of its recordings it holds; ``mean`` where no report says it."""
        with contextlib.suppress(DataError):
            return str(self._report("settings", "recipe", "channel"))
        return "mean"

    def without_duplicates(self) -> bool:
        """Return whether no two clips of the folder have the same samples.

        Raises:
            DataError: The report cannot be read.
        """
        dropped = self._report("settings", "drop_duplicates")
        return bool(dropped) or not self._report("duplicates")

    def _report(self, *keys: str) -> Any:
        content = _content(self.folder / REPORT)
        try:
            found = parse_json(content)
            for key in keys:
                found = found[key]
            return found
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{self.folder / REPORT}: damaged: prepare the data again") from error

    def sidecar_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row of each clip in this sequence and its line of :class:`Sidecar`.

        The order is by shard, whatever the order of the sequence.

        Raises:
            DataError: A sidecar cannot be read, or lacks a clip.
        """
        table = self.table()
        order = np.argsort(table[:, 0], kind="stable")
        shards, starts = np.unique(table[order, 0], return_index=True)
        for shard, rows in zip(shards, np.split(order, starts[1:]), strict=True):
            path = self.folder / SIDECAR.format(int(shard))
            try:
                lines = {line["offset"]: line for line in Sidecar.read(path).clips}
                for row in rows:
                    yield int(row), lines[int(table[row, 1])]
            except OSError as error:
                raise read_error(error, path) from error
            except KeyError as error:
                why = f"has no clip at byte {error}, which {INDEX} lists: prepare the data again"
                raise DataError(f"{path}: {why}") from error

    def names(self) -> list[str]:
        """Return the name of each clip's file in its shard.

        Raises:
            DataError: A sidecar cannot be read.
        """
        found = [""] * len(self)
        for row, line in self.sidecar_lines():
            found[row] = line["file"]
        return found

    def named(self, names: Sequence[str]) -> "ShardIndex":
        """Return the clips of these names, in the order of the names.

        Args:
            names: Names as :meth:`names` returns them, each once.

        Raises:
            DataError: There is no clip of a name, or a sidecar cannot be read.
        """
        order = {name: number for number, name in enumerate(names)}
        rows = np.full(len(names), -1)
        for row, line in self.sidecar_lines():
            if line["file"] in order:
                rows[order[line["file"]]] = row
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(names)} clips are not there (the first is "
                f"{names[missing[0]]:.200}): was it prepared anew from other recordings?"
            )
        return self.subset(rows)

    def fingerprint(self) -> str:
        """Return a hash of the positions of the clips in the shards."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 2**16):
            rows = slice(start, start + 2**16)
            part = self._index[rows if self.rows is None else self.rows[rows]]
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


ClipPath = str | Path | Segment | ShardClip  # a file, or a part of one
ClipPaths = Sequence[ClipPath]


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds prepared shards.

    Raises:
        DataError: It does, but is not finished; or a URL cannot be read.
    """

    def look() -> bool | None:
        if not (folder / SHARD).parent.is_dir():
            return False
        if (folder / REPORT).exists() and (folder / INDEX).exists():
            return True
        return None if (folder / ".lock").exists() else False  # somebody else's shards

    found = fetched(look, folder) if is_url(folder) else look()
    if found is None:
        raise DataError(
            f"{folder}: prepared in part only: run the same ssast data prepare once more"
        )
    return found


def read_labels(folder: Path, num_clips: int) -> tuple[tuple[str, ...], ...] | None:
    """Read the labels of the clips of a prepared folder; None if it has none.

    Raises:
        DataError: The file is damaged, or belongs to another index.
    """
    path = folder / LABELS
    if not (fetched(path.exists, path) if is_url(path) else path.exists()):
        return None
    data = _content(path)
    try:
        content = parse_json(data)
        names = content["names"]
        if not isinstance(names, list) or not all(map(is_name, names)):
            raise ValueError("names that are none")
        name_of = dict(enumerate(names))  # unlike a list, it has no number below 0
        labels = tuple(tuple(name_of[n] for n in numbers) for numbers in content["clips"])
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: damaged: prepare the data again") from error
    if len(labels) != num_clips:
        raise DataError(f"{path}: expected labels of {num_clips} clips, found {len(labels)}")
    return labels


def _content(path: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        DataError: It cannot be read.
    """
    if is_url(path):
        return fetched(path.read_bytes, path)
    try:
        return read_small(path)
    except OSError as error:
        raise read_error(error, path) from error


def _array(data: bytes) -> np.ndarray:
    """Return the array of an .npy file, which must be as long as its header says.

    Raises:
        ValueError: It is not.
    """
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.itemsize * math.prod(shape) != len(data) - file.tell():
        raise ValueError(f"its header states {shape} of {dtype}, found {len(data)} bytes")
    return np.load(io.BytesIO(data))


def _load_array(path: Path, dimensions: int) -> np.ndarray:
    data = _content(path) if is_url(path) else None
    try:
        if data is not None:
            array = _array(data)
        else:
            open_regular(path).close()
            array = np.load(path, mmap_mode="r")
    # What a damaged header makes of numpy's reader, which evaluates it as a literal of Python.
    except (
        OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError,
        tokenize.TokenError,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: cannot be read: {one_line(error):.200}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected an array, found an archive")
    if array.dtype != np.int64 or array.ndim != dimensions:
        raise DataError(f"{path}: expected {dimensions} dimensions of int64, found {array.dtype}")
    return array
