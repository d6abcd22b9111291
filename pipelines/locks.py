"""Locks on folders: one process at a time writes in a folder, and a record says which.

    .lock         locked through the kernel (POSIX), where the file system has locks
    .owner.json   host, process, job and start of the owner; its modification time is the heartbeat

The kernel's lock alone is not enough: some network file systems have none (ENOLCK), others keep it
on one machine (NFS with ``nolock``). The record alone is not enough either: a killed process leaves
it behind. A lock is therefore taken over from the owner in the record only

- on the machine of the owner: if there is no such process (a reused process id has another start);
- elsewhere: if the heartbeat stands still for ``STALE_S``, by the clock of the one who waits, as
  the clocks of machines differ;

and never while the kernel's lock is held.
"""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from ssast.pipelines.errors import FolderInUse, data_error
from ssast.pipelines.files import flush, machine_id
from ssast.pipelines.text import say

LOCK, OWNER = ".lock", ".owner.json"
HEARTBEAT_S = 15.0
STALE_S = 180.0
"""Time without a heartbeat after which an owner on another machine counts as dead."""

GRACE_S = 2.0  # for the owner of a kernel's lock to write its record
POLL_S = 0.5
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # hard links, as on FAT
JOBS = {
    "SLURM_JOB_ID": "Slurm",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "FLUX_JOB_ID": "Flux",
    "JOB_ID": "Grid Engine",
}
_held: set[str] = set()  # folders that this process has locked: POSIX locks do not tell its threads
_mutex = threading.Lock()


@dataclass(frozen=True)
class Owner:
    """The process that a record names.

    Attributes:
        token: Drawn for each lock that is taken.
        host: Name of its machine.
        machine: Boot of the kernel and namespace of process ids: where ``pid`` means something.
        pid: Process id.
        started: When the process began, in clock ticks of the machine.
        job: Job of a batch system; empty if there is none.
        since: When the lock was taken.
    """

    token: str = ""
    host: str = "unknown"
    machine: str = ""
    pid: int = 0
    started: str = ""
    job: str = ""
    since: str = "unknown"

    def is_running(self) -> bool | None:
        """Return whether the process exists; None if it is on another machine."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        if started is not None:
            return started == self.started
        try:  # /proc may hide the processes of other users
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


class FolderLock:
    """An exclusive lock on a folder, which ends with the process at the latest.

    A thread writes the heartbeat, and notices if another process has taken over. The context gives
    the lock back.

    Args:
        folder: The folder; it is created.
        doing: What an owner does, for messages, such as "another process is training".
    """

    def __init__(self, folder: Path, doing: str) -> None:
        self.folder, self._doing = folder, doing
        self._record = folder / OWNER
        self._token = uuid.uuid4().hex
        self._file: IO[str] | None = None
        self._pid = os.getpid()
        self._seen: tuple[str, int] | None = None
        self._seen_at: float | None = None
        self._over = threading.Event()
        self._successor: Owner | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Return the lock, which is not taken yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self.release()

    def acquire(self, limit_s: float = math.inf) -> bool:
        """Take the lock; wait while it is not certain whether the owner in the record lives.

        Args:
            limit_s: How long to wait in this call.

        Returns:
            Whether the lock is taken; False: it is still not certain, to be called again.

        Raises:
            FolderInUse: The owner lives.
            OSError: The folder cannot be written to.
        """
        end = time.monotonic() + limit_s
        try:
            self._reserve()
            while not self._attempt():
                if time.monotonic() >= end:
                    return False
                time.sleep(POLL_S)
            self._sweep()
        except BaseException:
            self.release()
            raise
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._thread.start()
        return True

    @property
    def lost(self) -> bool:
        """Whether another process has taken over."""
        return self._successor is not None

    def check(self) -> None:
        """Check that the lock is still this process's own.

        Raises:
            FolderInUse: Another process has taken over.
        """
        self._touch()
        if self.lost:
            raise FolderInUse(
                f"{self.folder}: another process has taken over this folder"
                f"{self._describe(self._successor)}: this one stops, and writes nothing more"
            )

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._file is None or os.getpid() != self._pid:
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join(GRACE_S)  # it may hang with its disk
        with contextlib.suppress(OSError):
            owner = self._read()
            if owner is not None and owner.token == self._token:
                self._record.unlink()
        self._file.close()  # the kernel's lock goes with it
        self._file = None
        with _mutex:
            _held.discard(os.path.realpath(self.folder))

    def _reserve(self) -> None:
        """Open the lock file, once in this process: closing it anywhere would give up the lock."""
        if self._file is not None:
            return
        key = os.path.realpath(self.folder)
        with _mutex:
            if key in _held:
                raise self._in_use(self._read())
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / LOCK, "w")  # noqa: SIM115
            _held.add(key)

    def _attempt(self) -> bool:
        """Try to take the lock; return whether it is taken."""
        locked, owner = self._lock_file(), self._read()
        running = False if owner is None else owner.is_running()
        silent_s = self._watch(owner)
        if running is False and locked is not False:
            return self._replace(owner)
        if running and locked is not True:
            raise self._in_use(owner)
        if silent_s < (GRACE_S if running is False else STALE_S):
            return False
        if locked is False:
            raise self._in_use(None if running is False else owner)
        return self._replace(owner)

    def _lock_file(self) -> bool | None:
        """Lock the file; return False if another process has it, None if there are no locks."""
        assert self._file is not None
        try:
            # A POSIX lock: unlike flock, no forked worker that outlives this process holds it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
        return True

    def _watch(self, owner: Owner | None) -> float:
        """Return for how long the record has not changed, in s.

        Raises:
            FolderInUse: It has changed since the last call.
        """
        heartbeat = 0
        with contextlib.suppress(FileNotFoundError):
            heartbeat = self._record.stat().st_mtime_ns
        seen, now = (owner.token if owner else "", heartbeat), time.monotonic()
        if self._seen_at is None:
            self._seen, self._seen_at = seen, now
            if owner is not None and owner.is_running() is None:
                say(
                    f"{self.folder}: waiting for up to {STALE_S:g} s, to see whether its owner is "
                    f"alive{self._describe(owner)}"
                )
        if seen != self._seen:
            if owner is not None:
                raise self._in_use(owner)
            self._seen, self._seen_at = seen, now  # given back
        return now - self._seen_at

    def _replace(self, owner: Owner | None) -> bool:
        """Write the record of this process; return False if another was faster.

        Args:
            owner: The dead owner whose record is removed.
        """
        if owner is not None:
            aside = self.folder / f"{OWNER}.{self._token}"
            try:
                os.rename(self._record, aside)
            except FileNotFoundError:
                return False
            taken = _read_owner(aside)
            if taken is not None and taken.token != owner.token:  # of one that was faster
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._record)
                aside.unlink()
                return False
            aside.unlink(missing_ok=True)  # the next owner may have swept it
        return self._create()

    def _create(self) -> bool:
        """Create the record, whole; return False if there is one. Atomic on NFS as well."""
        record = Owner(
            token=self._token,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            job=_job(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
        )
        content = json.dumps(asdict(record)) + "\n"
        whole = self.folder / f"{OWNER}.{self._token}"
        try:
            whole.write_text(content)
            flush(whole)
            os.link(whole, self._record)
        except FileExistsError:
            # The answer of a server may be lost, and the request be repeated.
            return whole.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                with open(self._record, "x") as file:
                    file.write(content)
            except FileExistsError:
                return False
        finally:
            whole.unlink(missing_ok=True)
        return True

    def _sweep(self) -> None:
        """Remove what processes left behind that were killed while they took the lock."""
        for path in self.folder.glob(f"{OWNER}.*"):
            with contextlib.suppress(OSError):
                owner = _read_owner(path)
                dead = owner is not None and owner.is_running() is False
                if dead or time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S) and not self.lost:
            self._touch()

    def _touch(self) -> None:
        """Write the heartbeat, if the record is still that of this process."""
        try:
            owner = self._read()
            if owner is None:  # removed by somebody: not a reason to stop
                self._create()
            elif owner.token == self._token:
                os.utime(self._record)
            else:
                self._successor = owner
        except OSError:  # the disk fails, and saves will say so; others see no heartbeat
            pass

    def _read(self) -> Owner | None:
        return _read_owner(self._record)

    def _in_use(self, owner: Owner | None) -> FolderInUse:
        return FolderInUse(f"{self.folder}: {self._doing} in this folder{self._describe(owner)}")

    def _describe(self, owner: Owner | None) -> str:
        """Return who an owner is, to go on with a sentence."""
        if owner is None:
            return ""
        where = f"host {owner.host}, process {owner.pid}"
        if owner.job:
            where += f", {owner.job}"
        try:
            age_s = max(time.time() - self._record.stat().st_mtime, 0.0)
            heartbeat = f", last heartbeat {age_s:.0f} s ago"
        except OSError:
            heartbeat = ""
        return f" ({where}, since {owner.since}{heartbeat})"


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Create a folder and lock it while the body writes there.

    Args:
        out: The folder.

    Raises:
        FolderInUse: Another process holds the lock.
        DataError: The body cannot write a file (a full disk).
    """
    with FolderLock(out, "another run is preparing data") as lock:
        try:
            lock.acquire()
        except OSError as error:
            raise data_error(error, f"{out}: cannot be written to: {error.strerror}") from error
        try:
            yield
        except OSError as error:
            reason = f"{error.filename or out}: {error.strerror or error}"
            raise data_error(error, f"preparing the data failed: {reason}") from error


@contextlib.contextmanager
def in_turn(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder while the body writes there; wait until other processes are done.

    Args:
        folder: The folder; it is created.
        doing: What an owner does, see :class:`FolderLock`.

    Raises:
        OSError: The folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(FolderLock(folder, doing))
            try:
                lock.acquire()
                break
            except FolderInUse:
                time.sleep(POLL_S)
        yield


def _read_owner(path: Path) -> Owner | None:
    """Read a record; None if there is none, an unknown owner if it is damaged."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Owner()


def _job() -> str:
    for variable, system in JOBS.items():
        if variable in os.environ:
            return f"{system} job {os.environ[variable]}"
    return ""


@functools.cache
def _machine() -> str:
    return machine_id() or uuid.uuid4().hex  # where it is unknown, no other process has the same


def _started(pid: int) -> str | None:
    """Return when a process began, "gone" for one that has ended; None if that is hidden."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "gone" if state in "ZX" else fields[18]
