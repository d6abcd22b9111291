"""Arrays that one process of a machine computes and all of them map into memory.

They are kept in the user's cache folder, so that the next start finds them as well: what a list of
millions of clips says, and what is held out of it. A file is named by what it is about and says
what it was made from (size, time and inode of the source), so one that is stale is made again, and
so is one that is torn: it ends with a checksum. Without a cache folder that can be written to, each
process holds its own.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from ssast.pipelines.files import cache_folder, replacing

log = logging.getLogger(__name__)

FORMAT = 2  # to be raised when the content of the files changes
LISTS: Final = "lists"  # their folder in the cache
SUFFIX = ".arrays"
TAIL = struct.Struct("<QI8s")  # where the description begins, checksum of all before, MAGIC
MAGIC = b"ssastarr"
LIMIT_BYTES = 8 * 2**30  # of all files; those used long ago are removed first
MANY = 2**18  # clips: fewer are not worth a file
SETTLED_S = 2.0  # a file that was changed since may change again without another time
Arrays = dict[str, np.ndarray]
Identity = tuple[tuple[Any, ...], tuple[Any, ...]]  # what arrays are about, and what of


def state_of(*paths: str | Path) -> tuple[Any, ...] | None:
    """Return what changes with files: size, time and inode; None if they have just been changed.

    Raises:
        OSError: There is no such file.
    """
    found = [os.stat(path) for path in paths]
    if any(time.time() - status.st_mtime < SETTLED_S for status in found):
        return None
    return tuple((status.st_size, status.st_mtime_ns, status.st_ino) for status in found)


class ArrayWriter:
    """Writes arrays one after the other, each of them at once or in parts."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._checksum, self._size = file, 0, 0
        self._found: dict[str, tuple[str, list[int], int]] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        """Write an array."""
        array = np.ascontiguousarray(array)
        start = self._begin()
        self._put(array.reshape(-1).view(np.uint8).data)
        self._found[name] = (array.dtype.str, list(array.shape), start)

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a [n] uint8 array."""
        start = self._begin()
        for part in parts:
            self._put(part)
        self._found[name] = ("|u1", [self._size - start], start)

    def finish(self, about: str) -> None:
        """Write what the arrays are, and what they are about."""
        start = self._begin()
        self._put(json.dumps({"about": about, "arrays": self._found}).encode())
        self._file.write(TAIL.pack(start, self._checksum, MAGIC))

    def _begin(self) -> int:
        self._put(bytes(-self._size % 64))
        return self._size

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._size += len(data)


def shared_arrays(
    what: tuple[Any, ...], state: tuple[Any, ...] | None, build: Callable[[ArrayWriter], None]
) -> Arrays:
    """Return arrays that another process has computed, or compute them for all.

    Args:
        what: What they are about, numbers and text: names the file.
        state: What they were computed from; if it has changed, they are computed again. None if
            they are not to be kept.
        build: Computes and writes them.

    Raises:
        OSError: From ``build``.
    """
    about = ascii((FORMAT, what, state))
    if state is None:
        return private_arrays(build)
    path = _path(what)
    try:
        found = _open(path, about)
        if found is None:
            with _locked(path):  # the others wait, and then find it
                found = _open(path, about)
                if found is None:
                    found = _make(path, about, build)
        return found
    except OSError as error:
        found = private_arrays(build)  # which raises again what the source is to blame for
        _warn_once(path.parent, error.strerror or str(error))
        return found


@cache
def _warn_once(folder: Path, reason: str) -> None:
    log.warning(
        "%s: %s: each process reads lists of clips for itself; SSAST_CACHE names another folder",
        folder, reason,
    )  # fmt: skip


def forget(what: tuple[Any, ...]) -> None:
    """Remove arrays that are not needed again; who has mapped them keeps them."""
    with contextlib.suppress(OSError):
        _path(what).unlink()


def _path(what: tuple[Any, ...]) -> Path:
    name = hashlib.blake2b(ascii(what).encode(), digest_size=16).hexdigest()
    return cache_folder(LISTS) / f"{name}{SUFFIX}"


def _make(path: Path, about: str, build: Callable[[ArrayWriter], None]) -> Arrays:
    with replacing(path, shared=True) as temporary, open(temporary, "wb") as file:
        writer = ArrayWriter(file)
        build(writer)
        writer.finish(about)
    _prune(path)
    found = _open(path, about)
    if found is None:
        raise OSError(0, "does not hold what was written", str(path))
    return found


def private_arrays(build: Callable[[ArrayWriter], None]) -> Arrays:
    """Return arrays in the memory of this process.

    Raises:
        OSError: From ``build``.
    """
    file = io.BytesIO()
    writer = ArrayWriter(file)
    build(writer)
    writer.finish("")
    found = _arrays(file.getbuffer(), "")
    assert found is not None
    return found


def _open(path: Path, about: str) -> Arrays | None:
    """Map a file into memory; None if it is missing, torn, or about something else."""
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.utime(path)  # it is in use
    except (OSError, ValueError):  # missing, empty
        return None
    return _arrays(memoryview(data), about)


def _arrays(data: memoryview, about: str) -> Arrays | None:
    try:
        start, checksum, magic = TAIL.unpack(data[-TAIL.size :])
        content = data[: -TAIL.size]
        if magic != MAGIC or zlib.crc32(content) != checksum:
            return None
        found = json.loads(bytes(content[start:]))
    except (struct.error, ValueError):
        return None
    if found["about"] != about:
        return None
    arrays = {}
    for name, (dtype, shape, first) in found["arrays"].items():
        size = int(np.prod(shape))
        array = np.frombuffer(content, dtype, size, first) if size else np.zeros(0, dtype)
        array = array.reshape(shape)
        array.flags.writeable = False
        arrays[name] = array
    return arrays


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; it ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        # A file system without locks: several may do the same work, and replace each other's file.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prune(newest: Path) -> None:
    """Remove the files that were used longest ago, beyond the limit."""
    room = LIMIT_BYTES
    found = [(path.stat(), path) for path in newest.parent.glob(f"*{SUFFIX}")]
    for status, path in sorted(found, key=lambda pair: -pair[0].st_mtime):
        room -= status.st_size
        if room < 0 and path != newest:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
