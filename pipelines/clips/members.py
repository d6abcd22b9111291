"""The sounds in a plain tar archive and their labels, in the layout of WebDataset.

A sample is what members have in common that are named alike up to the first dot: ``a/0001.flac``
with ``a/0001.json``, ``a/0001.cls`` or ``a/0001.txt``. No other member is opened: pickles, which
WebDataset takes for tensors, are left out like pictures.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, cast

from ssast.pipelines.clips.labels import is_name
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import parse_json, shown

LONGEST_HEADER = 2**14  # bytes: tarfile's time for one grows with the square of its length
LONGEST_LABEL = 2**20  # bytes of a member with labels
_ZEROS = 2**16  # bytes read at a time behind the last member
PACKED = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz")
LABEL_SUFFIXES = (".json", ".cls", ".txt")  # the first that a sample has counts
SAMPLE_KEYS = ("labels", "label", "cls", "class", "class_name", "category", "target")  # of a .json
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of compressed files
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound in an archive.

    Attributes:
        name: Name of the member.
        offset: Offset of its file in the archive, in bytes.
        size: Size of that file in bytes.
        sample: Number of its sample in the archive.
        labels: Labels of the sample; None if it has none.
        problem: Reason why it cannot be used, if so.
    """

    name: str
    offset: int
    size: int
    sample: int
    labels: Names | None = None
    problem: str | None = None


@dataclass
class Contents:
    """What an archive holds.

    Attributes:
        sounds: The sounds, in their order.
        left_out: Number of the other members by suffix.
        label_sources: Number of sounds by the suffix of the member with their labels.
        problem: What is wrong with the archive: what follows is lost.
    """

    sounds: list[Sound] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    label_sources: Counter[str] = field(default_factory=Counter)
    problem: str | None = None


def read_tar(
    path: object,
    file: "File",
    size: int,
    suffixes: Collection[str],
) -> Contents:
    """Find the sounds of a plain tar archive and read their labels.

    A sound that is no ordinary member is among them with its problem: a link, a path that leads
    out of the archive, a size that reaches beyond its end; and so is one whose labels are wrong.

    Args:
        path: Path of the archive, for messages.
        file: The archive.
        size: Its size in bytes.
        suffixes: Suffixes of sounds.

    Raises:
        DataError: The archive is compressed.
        OSError: It cannot be read.
    """
    found = Contents()
    labels = _Labels()
    samples: dict[str, int] = {}
    place = 0
    try:
        with cast(Any, tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:")) as archive:
            for member in archive:
                archive.members = []  # else all of them stay in memory
                if member.size < 0 or archive.offset <= place:  # else it comes again and again
                    raise tarfile.ReadError(f"a member at byte {place} ends before it begins")
                place = archive.offset
                inside = PurePosixPath(member.name)
                kind = os.path.splitext(inside.name)[1].lower()
                if member.isdir() or not inside.name or inside.name[0] == ".":
                    pass
                elif kind in suffixes:
                    key = sample_key(member.name)
                    sample = samples.setdefault(key, len(samples))
                    problem = _problem(member, inside, size)
                    found.sounds.append(
                        Sound(member.name, member.offset_data, member.size, sample, None, problem)
                    )
                elif kind in LABEL_SUFFIXES:
                    labels.add(member.name, kind, partial(_content, file, member, inside, size))
                else:
                    found.left_out[kind or inside.name] += 1
                if place > size:
                    raise tarfile.ReadError("unexpected end of data")
            place = archive.offset
        behind = _behind_zeros(file, place)
        if behind is not None:
            what = "damaged archive: no header" if behind == place else "another archive begins"
            found.problem = f"{what} at byte {behind} of {size}: what follows is lost"
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        file.seek(0)
        if file.read(6).startswith(MAGIC):
            why = "a compressed archive cannot be read in place: unpack it"
            raise DataError(f"{path}: {why}") from error
        found.problem = f"damaged archive: {error}"
    found.sounds = [labels.give(sound, found.label_sources) for sound in found.sounds]
    return found


def _behind_zeros(file: "File", place: int) -> int | None:
    """Return where the first block stands that is not zero; None if there is none to the end."""
    file.seek(place)
    while data := file.read(_ZEROS):
        if any(data):
            first = len(data) - len(data.lstrip(b"\0"))
            return place + first - first % tarfile.BLOCKSIZE
        place += len(data)
    return None


def parse_sample(kind: str, data: bytes) -> Names | None:
    """Return the labels that a member holds; None for a .json that says nothing of any.

    A name is taken as it is, commas and all; numbers are names as well.

    Args:
        kind: ``.json``: an object with one of :data:`SAMPLE_KEYS`, or a name, or a list of them.
            ``.cls`` or ``.txt``: a name in each line.
        data: Content of the member.

    Raises:
        ValueError: It holds something else.
    """
    text = data.decode("utf-8-sig")
    given: Any = text.splitlines()
    if kind == ".json":
        given = parse_json(text)
        if isinstance(given, dict):
            key = next((key for key in SAMPLE_KEYS if given.get(key) is not None), None)
            if key is None:
                return None
            given = given[key]
    listed = given if isinstance(given, list) else [given]
    names = [str(name) if type(name) is int else name for name in listed]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a label or a list of them, found {shown(given)}")
    names = [name.strip() for name in names if name.strip()]
    if not all(map(is_name, names)):
        raise ValueError(f"expected labels that are text, found {shown(given)}")
    return tuple(dict.fromkeys(names))


class _Labels:
    """The labels in an archive: by the name of a member without its suffix, and by sample."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Names | str]] = {}  # suffix -> labels, or what is wrong

    def add(self, name: str, kind: str, read: Callable[[], bytes]) -> None:
        try:
            labels: Names | str | None = parse_sample(kind, read())
        except ValueError as error:
            labels = f"its labels cannot be read: {name}: {error}"
        if labels is not None:
            stem = os.path.splitext(name)[0]
            for key in dict.fromkeys((stem, sample_key(name))):
                self._found.setdefault(key, {}).setdefault(kind, labels)

    def give(self, sound: Sound, sources: Counter[str]) -> Sound:
        found = self._found.get(os.path.splitext(sound.name)[0]) or self._found.get(
            sample_key(sound.name)
        )
        if not found:
            return sound
        kind = next(kind for kind in LABEL_SUFFIXES if kind in found)
        labels = found[kind]
        if isinstance(labels, str):
            return replace(sound, problem=sound.problem or labels)
        sources[kind] += 1
        return replace(sound, labels=labels)


def sample_key(name: str) -> str:
    """Return what the members of a sample have in common: the name up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _problem(member: tarfile.TarInfo, inside: PurePosixPath, size: int) -> str | None:
    if inside.is_absolute() or ".." in inside.parts:
        return "its path leads out of the archive"
    if not member.isreg() or member.issparse():
        return "a link, a device or sparse, not an ordinary member"
    if member.offset_data + member.size > size:
        there = size - member.offset_data
        return f"truncated: the archive ends after {there} of {member.size} bytes"
    return None


def _content(file: "File", member: tarfile.TarInfo, inside: PurePosixPath, size: int) -> bytes:
    """Return the content of a member with labels.

    Raises:
        ValueError: It is no ordinary member, or a long one.
        OSError: It cannot be read.
    """
    problem = _problem(member, inside, size)
    if problem is not None:
        raise ValueError(problem)
    if member.size > LONGEST_LABEL:
        raise ValueError(f"{member.size} bytes, expected at most {LONGEST_LABEL}")
    file.seek(member.offset_data)
    data = bytearray()
    while len(data) < member.size and (part := file.read(member.size - len(data))):
        data += part
    return bytes(data)


class _Headers:
    """A file for ``tarfile``, which reads headers alone: as long as one states, without a bound."""

    def __init__(self, file: "File") -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int = -1) -> bytes:
        return self._read(min(size, LONGEST_HEADER) if size >= 0 else LONGEST_HEADER)


class Window(io.RawIOBase):
    """A file behind a URL, read forwards by ranges of bytes.

    Args:
        read: Reads the bytes from one position to another.
        size: Size of the file in bytes.
        width: Bytes that are read at once.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, width: int) -> None:
        self._fetch, self.size, self._width = read, size, width
        self._position = self._start = 0
        self._data = b""

    def read(self, size: int = -1) -> bytes:
        """Read from the position, fewer bytes at the end of the file.

        Raises:
            OSError: It cannot be read.
        """
        start = self._position
        end = self.size if size < 0 else min(self.size, start + size)
        if start >= end:
            return b""
        if not self._start <= start <= end <= self._start + len(self._data):
            last = min(self.size, max(end, start + self._width))
            data = self._fetch(start, last)
            if len(data) != last - start:
                raise OSError(5, f"expected {last - start} bytes at {start}, got {len(data)}")
            self._data, self._start = data, start
        self._position = end
        return self._data[start - self._start : end - self._start]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position in the file; return the new one."""
        self._position = max(0, offset + (0, self._position, self.size)[whence])
        return self._position

    def tell(self) -> int:
        """Return the position in the file."""
        return self._position


File = io.FileIO | Window  # on a disk, or behind a URL
