"""Files behind URLs (s3://, gs://, https://, ...), through fsspec.

universal_pathlib lets a folder there be used as a ``Path`` is. What training reads of it, clip by
clip, are ranges of bytes.
"""

import contextlib
import errno
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import fsspec

from ssast.pipelines.errors import DataError

T = TypeVar("T")


def is_url(place: object) -> bool:
    """Whether this is no path on a disk of this machine."""
    return "://" in str(place)


def located(place: str | Path) -> Path:
    """A path, or what can be used like one: ``file://`` is a disk, other URLs are not.

    Raises:
        DataError: What is needed for this URL is not installed, or it is of no known kind.
    """
    if isinstance(place, Path) and re.match("[a-z0-9]+:/[^/]", str(place)):
        raise DataError(f"{place}: a URL does not survive as a Path: pass it as a string")
    if not is_url(place):
        return Path(place)
    if str(place).startswith("file://"):
        return Path(str(place).removeprefix("file://"))
    try:
        from upath import UPath

        path = UPath(place)
        assert path.fs is not None  # opens the storage: what is missing is missed here
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{place}: {why} (see also: pip install 'ssast-engine[remote]')") from error
    return cast(Path, path)


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes of a file, fewer if it ends before.

    Raises:
        OSError: It cannot be read.
    """
    system, path = fsspec.core.url_to_fs(url)
    return attempt(lambda: system.cat_file(path, start=start, end=end), url)


@functools.cache
def version(url: str) -> str:
    """Changes when the file does; asked for once in a process.

    Raises:
        OSError: It cannot be found.
    """
    system, path = fsspec.core.url_to_fs(url)
    return str(attempt(lambda: system.ukey(path), url))


@contextlib.contextmanager
def on_disk(place: object) -> Iterator[Path]:
    """A file on this machine that holds what is there, for as long as it is needed.

    Raises:
        OSError: It cannot be read.
    """
    if not is_url(place):
        yield cast(Path, place)
        return
    system, path = fsspec.core.url_to_fs(str(place))
    with tempfile.TemporaryDirectory(prefix="ssast-") as folder:
        local = Path(folder) / f"recording{os.path.splitext(path)[1]}"
        attempt(lambda: system.get_file(path, os.fspath(local)), str(place))
        yield local


def attempt(action: Callable[[], T], url: str) -> T:
    """What ``action`` returns; any error as one of the system's.

    Raises:
        OSError: It has failed. EIO, which is worth another attempt, for errors of the network.
    """
    try:
        return action()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        number = error.errno or errno.ENOENT
        raise type(error)(number, os.strerror(number), url) from error
    except Exception as error:  # each kind of storage has a library with errors of its own
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", url) from error
