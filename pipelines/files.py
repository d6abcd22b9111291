"""Files that appear whole or not at all, folders that one process owns, cores that may be used."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ssast.pipelines.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in one move: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Creates ``out`` and keeps every other run away from it; the lock dies with the process.

    Raises:
        DataError: Another run is at work there, or a file cannot be written (a full disk).
    """
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(out / ".lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another run is preparing data in this folder") from error
        except OSError as error:
            raise DataError(f"{out}: cannot be written to: {error.strerror}") from error
        try:
            yield
        except OSError as error:
            what = f"{error.filename or out}: {error.strerror or error}"
            raise DataError(f"preparing the data failed: {what}") from error


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
