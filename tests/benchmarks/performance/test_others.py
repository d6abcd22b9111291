"""What is measured beside other programs is measured again, and not published."""

import subprocess
import sys
import time

import psutil
import pytest

from ssast.benchmarks.performance import others
from ssast.benchmarks.performance.others import OtherWork
from ssast.benchmarks.performance.records import publish
from ssast.benchmarks.performance.store import TRIES, ResultStore, Scope
from ssast.engine.errors import ConfigError

MACHINE = {"name": "a CPU, 2 cores"}
BUSY = "import time; end = time.time() + 1.2\nwhile time.time() < end: pass"


def test_own_processes_do_not_count_and_those_of_others_do(monkeypatch):
    busy = [sys.executable, "-c", BUSY]
    with OtherWork() as own:
        subprocess.run(busy, check=True)
    # A process that the context does not know as its own: as if another had started it.
    process = subprocess.Popen(busy)
    monkeypatch.setattr(others, "_is_ours", lambda pid, _: pid != process.pid)
    with OtherWork() as foreign:
        time.sleep(0.8)
    process.wait()
    cores = psutil.cpu_count()
    assert foreign._seconds > 0.1 and foreign.share > 0.1 / 0.8 / cores / 4
    assert own._wall_s > 1.0


@pytest.fixture
def shares(monkeypatch):
    """What others had, case by case."""
    given: list[float] = []
    monkeypatch.setattr(OtherWork, "share", property(lambda self: self.given))
    enter = OtherWork.__enter__

    def entered(self):
        self.given = given.pop(0)
        return enter(self)

    monkeypatch.setattr(OtherWork, "__enter__", entered)
    return given


def test_a_disturbed_case_is_measured_again(shares, tmp_path, capsys):
    store, taken = ResultStore(tmp_path), []
    shares += [0.4, 0.01, 0.0]
    cases = {name: lambda name=name: taken.append(name) or len(taken) for name in "ab"}
    store.measure("loader", cases, Scope(), MACHINE)
    assert taken == ["a", "a", "b"] and store.read("loader") == {"a": 2, "b": 3}
    assert not store.disturbed()
    assert "other programs took 40% of the machine: again" in capsys.readouterr().out


def test_what_stays_disturbed_is_not_published(shares, tmp_path):
    store, taken = ResultStore(tmp_path / "runs"), []
    shares += [0.5] * TRIES + [0.0]
    cases = {"a": lambda: taken.append("a") or len(taken)}
    store.measure("loader", cases, Scope(), MACHINE)
    assert len(taken) == TRIES and store.disturbed() == {"loader, a": 0.5}
    with pytest.raises(ConfigError, match=r"1 cases were disturbed .*loader, a most.*50%"):
        publish(store, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
    store.measure("loader", cases, Scope(), MACHINE)  # idle now
    assert store.read("loader") == {"a": TRIES + 1} and not store.disturbed()
