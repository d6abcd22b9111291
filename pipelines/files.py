"""The cache folder, atomic writes and appending."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ssast.pipelines.errors import DataError

CACHE = "SSAST_CACHE"  # environment: folder of all that is kept for later runs
Kept = Literal["weights", "packages", "lists"]
TEMPORARY = ".tmp-"
NAME_MAX = 255  # bytes in the name of a file, on every file system in use


def cache_folder(kind: Kept) -> Path:
    """Return a folder of what is kept for later runs: in ``SSAST_CACHE``, else in the user's cache.

    Args:
        kind: ``weights`` (fetched by name or address), ``packages`` (of the demo's recordings), or
            ``lists`` (of clips, and digests of files).
    """
    return Path(os.path.expanduser(os.environ.get(CACHE) or "~/.cache/ssast")) / kind


@contextlib.contextmanager
def replacing(
    path: Path, *, durable: bool = False, shared: bool = False, inside: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` at the end, or is removed if the body raises.

    Readers see the old file or the whole new one, never a part. The body may make a folder instead,
    if there is none (or an empty one) at ``path`` when it ends. What a killed process leaves behind
    has a name that starts with ``.tmp-``; the next write of ``path`` takes its place.

    Args:
        path: Path of the file; its folder is created.
        durable: Whether the content, then the new name, survive a loss of power once this returns.
        shared: Whether several processes or machines may write ``path`` at the same time; what a
            killed one leaves behind then stays.
        inside: Folder of the temporary path, on the same file system; that of ``path`` if None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if shared or path.with_name(TEMPORARY + name).is_dir():  # which could not be removed
        name = uuid.uuid4().hex
    if len(os.fsencode(name)) > NAME_MAX - len(TEMPORARY):
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    temporary = (path.parent if inside is None else inside) / (TEMPORARY + name)
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        raise
    if durable:
        flush(path.parent)


def write_atomically(
    path: Path,
    content: str | bytes,
    *,
    durable: bool = False,
    shared: bool = False,
    inside: Path | None = None,
) -> None:
    """Write a file, text as UTF-8, whole or not at all; see :func:`replacing`.

    The bytes of names in the text that are not UTF-8 are written as they are.
    """
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    with replacing(path, durable=durable, shared=shared, inside=inside) as temporary:
        temporary.write_bytes(data)


def append(path: Path, data: bytes) -> None:
    """Append to a file, which several processes may do: a full disk leaves no part of the data.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, written = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 0
    try:
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if written and os.fstat(descriptor).st_size == end:  # nothing of others after it
            os.ftruncate(descriptor, end - written)
        raise
    finally:
        os.close(descriptor)


def use_default_mode(path: Path) -> None:
    """Give a file the mode of any new file in its folder: that of the umask, or of the ACL.

    For libraries that create files which nobody else may read, whatever the umask.
    """
    # Only a new file tells: reading the umask means setting it, for all threads.
    probe = path.with_name(f".tmp-{uuid.uuid4().hex}")
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        probe.unlink()


def check_new(outputs: Iterable[str | Path], inputs: Iterable[str | Path] = ()) -> None:
    """Check that nothing is overwritten: the one rule for what a user names as an output.

    Args:
        outputs: Files that will be written, or folders that will be filled.
        inputs: What the command reads, for a message that says so.

    Raises:
        DataError: An output exists already, and is not an empty folder.
    """
    for output in map(Path, outputs):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            continue
        for source in inputs:
            with contextlib.suppress(OSError):  # it may be a URL, or not exist
                if os.path.samefile(source, output):
                    raise DataError(f"{output}: is an input of this command: choose another output")
        raise DataError(f"{output}: exists already: remove it, or choose another output")


def check_writable(folder: str | Path) -> None:
    """Create a folder that a command will write to, before it does any work.

    Raises:
        DataError: It cannot be written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to: {error.strerror or error}") from error


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def open_regular(path: str | bytes | Path) -> io.FileIO:
    """Open a file for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device, which may never end.
    """
    with contextlib.suppress(IsADirectoryError):
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def machine_id() -> str | None:
    """Return what names this boot of the machine and namespace of process ids; None if unknown.

    Processes with the same one can see each other.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
