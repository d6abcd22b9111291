"""Locks on folders: one owner, named, and followed only when it is dead."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ssast.pipelines import locks
from ssast.pipelines.errors import FolderInUse
from ssast.pipelines.locks import FolderLock, Owner, in_turn

DOING = "another process is training"

HOLD = """
import sys
from pathlib import Path
from ssast.pipelines import locks
if sys.argv[2] == "no locks":
    def none(*_):
        raise OSError(37, "No locks available")
    locks.fcntl.lockf = none
lock = locks.FolderLock(Path(sys.argv[1]), "another process is training")
assert lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock of a folder."""
    started = []

    def hold(kind="locks", **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as NFS without lockd."""

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "lockf", none)


@pytest.fixture
def soon(monkeypatch):
    """Shorter times."""
    for name, value in (
        ("HEARTBEAT_S", 0.05),
        ("STALE_S", 0.5),
        ("GRACE_S", 0.2),
        ("POLL_S", 0.02),
    ):
        monkeypatch.setattr(locks, name, value)


def leave(folder, **changed):
    """Leave the record of this process, as if it had been killed."""
    with FolderLock(folder, DOING) as lock:
        assert lock.acquire()
        record = json.loads((folder / locks.OWNER).read_text())
    (folder / locks.OWNER).write_text(json.dumps(record | {"token": "old"} | changed))


def take(folder, limit_s=60.0):
    with FolderLock(folder, DOING) as lock:
        taken = lock.acquire(limit_s)
        if taken:
            lock.check()
            assert json.loads((folder / locks.OWNER).read_text())["pid"] == os.getpid()
        return taken


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_the_owner_is_named_and_followed_when_it_is_dead(tmp_path, hold, kind, request):
    if kind == "no locks":
        request.getfixturevalue("no_locks")
    owner = hold(kind, SLURM_JOB_ID="77")
    host = os.uname().nodename
    named = (
        rf"{tmp_path}: {DOING} in this folder \(host {host}, process {owner.pid}, Slurm job 77, "
        r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d, last heartbeat \d s ago\)"
    )
    for _ in range(2):
        with pytest.raises(FolderInUse, match=named):
            take(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert take(tmp_path)
    assert names(tmp_path) == [locks.LOCK]
    following = hold(kind)
    following.communicate()
    assert following.returncode == 0
    assert names(tmp_path) == [locks.LOCK], "given back"


def test_two_that_begin_at_once_are_one(tmp_path, no_locks, hold):
    """The record alone: of twelve processes that begin together, one takes the folder."""
    leave(tmp_path, pid=2**22 + 1)  # dead
    go = tmp_path / "go"
    program = f"""
import time
from pathlib import Path
from ssast.pipelines import errors, locks
def none(*_):
    raise OSError(37, "No locks available")
locks.fcntl.lockf = none
lock = locks.FolderLock(Path({str(tmp_path)!r}), "x")
print("ready", flush=True)
while not Path({str(go)!r}).exists():
    time.sleep(0.001)
try:
    print("taken" if lock.acquire() else "late", flush=True)
    input()
except errors.FolderInUse:
    print("in use", flush=True)
"""
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    assert {process.stdout.readline() for process in racing} == {"ready\n"}
    go.touch()
    said = sorted(process.stdout.readline() for process in racing)
    for process in racing:
        process.communicate("\n")
    assert said == ["in use\n"] * 5 + ["taken\n"]


def test_a_reused_process_id_is_another_process(tmp_path, no_locks):
    leave(tmp_path)
    with pytest.raises(FolderInUse):
        take(tmp_path)
    leave_started = json.loads((tmp_path / locks.OWNER).read_text()) | {"started": "1"}
    (tmp_path / locks.OWNER).write_text(json.dumps(leave_started))
    assert take(tmp_path, 0.0)


def test_a_zombie_is_dead(tmp_path, no_locks):
    child = os.fork()
    if child == 0:
        os._exit(0)
    while locks._started(child) != "gone":
        time.sleep(0.001)
    leave(tmp_path, pid=child)
    assert take(tmp_path, 0.0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_another_machine_is_watched(tmp_path, soon, kind, request, capsys):
    if kind == "no locks":
        request.getfixturevalue("no_locks")
    # Its clock is a year ahead: only changes count.
    leave(tmp_path, machine="other", host="b7", pid=1)
    ahead = time.time() + 365 * 86400
    os.utime(tmp_path / locks.OWNER, (ahead, ahead))
    assert not take(tmp_path, 0.1)
    begin = time.monotonic()
    assert take(tmp_path)
    assert time.monotonic() - begin > 0.5
    assert "waiting for up to 0.5 s, to see whether its owner is alive (host b7, process 1, si" in (
        capsys.readouterr().out
    )


def test_a_heartbeat_is_life(tmp_path, soon, monkeypatch):
    leave(tmp_path, machine="other")
    lock = FolderLock(tmp_path, DOING)
    with lock:
        assert not lock.acquire(0.0)
        os.utime(tmp_path / locks.OWNER, (5, 5))  # its clock stands before ours
        with pytest.raises(FolderInUse, match="another process is training"):
            lock.acquire()
    assert names(tmp_path) == [locks.LOCK, locks.OWNER]


def test_an_owner_beats(tmp_path, soon):
    with FolderLock(tmp_path, DOING) as lock:
        assert lock.acquire()
        os.utime(tmp_path / locks.OWNER, (5, 5))
        deadline = time.monotonic() + 10
        while (tmp_path / locks.OWNER).stat().st_mtime == 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / locks.OWNER).stat().st_mtime < 60


def test_a_lock_that_is_stolen_is_noticed(tmp_path, soon):
    with FolderLock(tmp_path, DOING) as lock:
        assert lock.acquire()
        (tmp_path / locks.OWNER).unlink()  # by hand, say: no reason to stop
        lock.check()
        thief = Owner(token="other", host="b7", machine="m", pid=9, since="noon")
        (tmp_path / locks.OWNER).write_text(json.dumps(vars(thief)))
        stolen = r"another process has taken over this folder \(host b7, process 9, since noon"
        with pytest.raises(FolderInUse, match=stolen):
            lock.check()
        assert lock.lost
    assert json.loads((tmp_path / locks.OWNER).read_text())["token"] == "other"


def test_a_held_lock_outlives_a_silent_record(tmp_path, soon, hold):
    """The kernel's lock of a machine that is gone, which its server will free: never stolen."""
    hold()
    record = json.loads((tmp_path / locks.OWNER).read_text())
    (tmp_path / locks.OWNER).write_text(json.dumps(record | {"machine": "other"}))
    with pytest.raises(FolderInUse):
        take(tmp_path)
    (tmp_path / locks.OWNER).unlink()
    with pytest.raises(FolderInUse, match=f"{DOING} in this folder$"):
        take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]", '{"x": 1}'])
def test_a_damaged_record_is_of_somebody(tmp_path, soon, content):
    (tmp_path / locks.OWNER).write_text(content)
    assert not take(tmp_path, 0.1)
    assert take(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.os, "link", none)
    leave(tmp_path, pid=2**22 + 1)
    assert take(tmp_path, 0.0)
    assert names(tmp_path) == [locks.LOCK]


def test_the_answer_of_a_server_may_be_lost(tmp_path, monkeypatch):
    def repeated(source, target, real=os.link):
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)

    monkeypatch.setattr(locks.os, "link", repeated)
    assert take(tmp_path, 0.0)


def test_a_record_of_one_that_was_faster_is_put_back(tmp_path):
    leave(tmp_path, token="faster", pid=1)
    with FolderLock(tmp_path, DOING) as lock:
        assert not lock._replace(Owner(token="dead"))
    assert json.loads((tmp_path / locks.OWNER).read_text())["token"] == "faster"
    assert names(tmp_path) == [locks.LOCK, locks.OWNER]


def test_others_wait_for_their_turn(tmp_path, soon, hold):
    owner = hold()
    begin = time.monotonic()
    os.kill(owner.pid, signal.SIGSTOP)  # still the owner
    with pytest.raises(FolderInUse):
        take(tmp_path)
    os.kill(owner.pid, signal.SIGCONT)
    owner.stdin.close()
    with in_turn(tmp_path, DOING):
        assert (tmp_path / locks.OWNER).exists()
    assert time.monotonic() - begin < 60


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        take(tmp_path / "file")
    (tmp_path / "file").unlink()
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(locks.os, "link", lambda *_: os.stat("/nowhere"))
        take(tmp_path)
    assert names(tmp_path) == [locks.LOCK]
    assert take(tmp_path, 0.0)
