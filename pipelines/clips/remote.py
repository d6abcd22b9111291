"""Files behind URLs (s3://, gs://, https://, ...), through fsspec.

universal_pathlib lets a folder there be used like a ``Path``. Training reads ranges of bytes, clip
by clip.
"""

import contextlib
import errno
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from ssast.pipelines.clips.retry import Retry
from ssast.pipelines.errors import DataError, read_error
from ssast.pipelines.text import one_line

T = TypeVar("T")
REFUSED = (400, 401, 403, 404, 405, 410, 416)  # HTTP statuses that another attempt cannot change

RETRY_S = 60.0  # for which storage may fail where a data set is opened
CHANGING = frozenset(  # what storages say that changes with a file
    (
        *("size", "etag", "mtime", "lastmodified", "last_modified", "last-modified", "created"),
        *("updated", "generation", "content-md5", "md5hash", "versionid"),
    )
)


def is_url(place: object) -> bool:
    """Return whether this is a URL, not a path on this machine."""
    return "://" in str(place)


def as_path(place: str | Path) -> Path:
    """Return a path, or an object that can be used like one for a URL; ``file://`` is a path.

    Raises:
        DataError: The package for this kind of URL is not installed, or the kind is unknown.
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
        why = one_line(error)
        raise DataError(f"{place}: {why} (see also: pip install 'ssast-engine[remote]')") from error
    return cast(Path, path)


def _storage(url: str) -> tuple[Any, str]:
    """Return the storage of a URL, and the path there."""
    import fsspec  # takes a while, and most clips are local files

    return fsspec.core.url_to_fs(url)


def read_range(url: str, start: int, end: int) -> bytes:
    """Read a range of bytes of a file, fewer if it ends before.

    Raises:
        OSError: It cannot be read, or the server sends all of it.
    """
    system, path = _storage(url)
    data = as_os_error(lambda: system.cat_file(path, start=start, end=end), url)
    if len(data) > end - start:
        raise OSError(errno.EOPNOTSUPP, "the server does not serve ranges of bytes", url)
    return data


def file_size(url: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        OSError: It cannot be found, or the storage does not tell.
    """
    system, path = _storage(url)
    size = as_os_error(lambda: system.size(path), url)
    if not isinstance(size, int):
        raise OSError(errno.EINVAL, "its size is not known", url)
    return size


def file_facts(url: str) -> dict[str, Any]:
    """Return what the storage tells of a file: its size, its times, ..., under names of its own.

    Raises:
        OSError: It cannot be found.
    """
    system, path = _storage(url)
    return dict(as_os_error(lambda: system.info(path), url))


def changing(facts: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return those of :func:`file_facts` that change with the file."""
    return tuple(sorted((key, str(facts[key])) for key in facts if key.lower() in CHANGING))


def matching(pattern: str) -> list[str]:
    """Return the URLs of the files that a URL with ``*``, ``?`` and ``[...]`` stands for.

    Raises:
        OSError: The storage cannot list them.
    """
    system, path = _storage(pattern)
    found = as_os_error(lambda: system.glob(path), pattern)
    return [system.unstrip_protocol(name) for name in found]


@functools.cache
def version(url: str) -> str:
    """Return a token that changes when the file does; asked for once in a process.

    Raises:
        OSError: It cannot be found.
    """
    system, path = _storage(url)
    return str(as_os_error(lambda: system.ukey(path), url))


@contextlib.contextmanager
def on_disk(place: object) -> Iterator[Path]:
    """Provide a file behind a URL, or a local one, as a file on this machine, within a context.

    Raises:
        OSError: It cannot be read.
    """
    if not is_url(place):
        yield cast(Path, place)
        return
    system, path = _storage(str(place))
    with tempfile.TemporaryDirectory(prefix="ssast-") as folder:
        local = Path(folder) / f"recording{os.path.splitext(path)[1]}"
        as_os_error(lambda: system.get_file(path, os.fspath(local)), str(place))
        yield local


def fetched(action: Callable[[], T], url: object) -> T:
    """Return what ``action`` finds behind a URL; it is repeated while storage fails.

    Raises:
        StorageError: Storage kept failing.
        DataError: The action failed for another reason.
    """
    try:
        return Retry(RETRY_S).call(lambda: as_os_error(action, str(url)), url)
    except OSError as error:
        raise read_error(error, url) from error


def as_os_error(action: Callable[[], T], url: str) -> T:
    """Return what ``action`` returns; raise any error as an OSError.

    Raises:
        OSError: The action failed. EIO, which is worth another attempt, for network errors and for
            servers that fail; EACCES where a server refuses the request.
    """
    try:
        return action()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        number = error.errno or errno.ENOENT
        raise type(error)(number, os.strerror(number), url) from error
    except Exception as error:  # each kind of storage has a library with errors of its own
        refused = getattr(error, "status", 0) in REFUSED
        raise OSError(
            errno.EACCES if refused else errno.EIO, f"{type(error).__name__}: {error}", url
        ) from error
