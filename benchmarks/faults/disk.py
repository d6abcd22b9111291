"""A disk that can be full or read-only: a small tmpfs, or where mounting is not allowed, limits."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

SMALL_FILE = 4096  # bytes: what a file may have where a full disk is only played


class Unavailable(RuntimeError):
    """A fault that cannot be made on this machine by this user; the message says why."""


def _mount(*arguments: object, keep: int | None = None) -> bool:
    """Mount something, with a file that stays open; return whether that was possible."""
    command, files = ["mount", *map(str, arguments)], [] if keep is None else [keep]
    try:
        done = subprocess.run(command, capture_output=True, check=False, pass_fds=files)
        return done.returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=True)


class Disk:
    """The disk of a run.

    Args:
        folder: Where it is mounted; it is made.
        mebibytes: Its size.

    Attributes:
        mounted: Whether it is a file system of its own.
    """

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.mounted = _mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "faults", folder)

    def close(self) -> None:
        """Unmount it."""
        if self.mounted:
            _unmount(self.folder)

    @contextlib.contextmanager
    def full(self, pids: Iterable[int]) -> Iterator[None]:
        """Leave no space inside; without a disk of its own, no process may write large files.

        Args:
            pids: The processes.
        """
        if not self.mounted:
            with limited(pids, resource.RLIMIT_FSIZE, SMALL_FILE):
                yield
            return
        filler = self.folder / "filler"
        try:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """Let nothing be written in a folder on this disk inside.

        Raises:
            Unavailable: Permissions do not bind this user, and nothing can be mounted.
        """
        if self.mounted:
            if not _mount("--bind", folder, folder):
                raise Unavailable("mount --bind is not allowed")
            try:
                if not _mount("-o", "remount,bind,ro", folder):
                    raise Unavailable("mount -o remount,bind,ro is not allowed")
                yield
            finally:
                _unmount(folder)
            return
        if os.geteuid() == 0:
            raise Unavailable("root may write everywhere, and nothing can be mounted")
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)


@contextlib.contextmanager
def disconnected(folder: Path) -> Iterator[None]:
    """Let everything in a folder fail with ENOTCONN inside, as a network mount that has died.

    It is a FUSE mount whose server is gone.

    Raises:
        Unavailable: Nothing can be mounted.
    """
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        raise Unavailable(f"/dev/fuse: {error.strerror}") from error
    try:
        owner = f"user_id={os.geteuid()},group_id={os.getegid()}"
        options = f"fd={server},rootmode=40000,{owner}"
        if not _mount("-i", "-t", "fuse", "-o", options, "faults", folder, keep=server):
            raise Unavailable("mount -t fuse is not allowed")
    finally:
        os.close(server)
    try:
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def limited(pids: Iterable[int], limit: int, value: int) -> Iterator[None]:
    """Set a limit of other processes inside, see :mod:`resource`; those that end are left out."""
    before = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            soft, hard = resource.prlimit(pid, limit)
            resource.prlimit(pid, limit, (value, hard))
            before[pid] = (soft, hard)
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, limit, limits)
