"""How much of a machine other programs take while something is measured."""

import os
import threading
import time
from types import TracebackType
from typing import Self

import psutil

INTERVAL_S = 2.0  # between looks at the processes: one that ends in between is missed


class OtherWork:
    """A context that adds up the CPU time of processes that this one did not start.

    Time that a hypervisor gave to other machines (steal) counts as well.
    """

    def __enter__(self) -> Self:
        self._begun, self._stolen = time.monotonic(), _stolen()
        self._seconds, self._before = 0.0, _foreign()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        self._look()
        self._wall_s = time.monotonic() - self._begun
        self._stolen = _stolen() - self._stolen

    @property
    def share(self) -> float:
        """Share of all cores' time that others had, once the context is left."""
        cores = psutil.cpu_count() or 1
        return (self._seconds + self._stolen) / max(self._wall_s * cores, 1e-9)

    def _watch(self) -> None:
        while not self._end.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        now = _foreign()
        self._seconds += sum(
            seconds - self._before.get(process, 0.0) for process, seconds in now.items()
        )
        self._before = now


def _foreign() -> dict[tuple[int, float], float]:
    """Return the CPU seconds of all processes but this one and its descendants."""
    found = {
        process.info["pid"]: process.info
        for process in psutil.process_iter(["pid", "ppid", "cpu_times", "create_time"])
        if process.info["cpu_times"] is not None
    }
    return {
        (pid, info["create_time"]): info["cpu_times"].user + info["cpu_times"].system
        for pid, info in found.items()
        if not _is_ours(pid, found)
    }


def _is_ours(pid: int, found: dict[int, dict[str, int]]) -> bool:
    seen = set[int]()
    while pid in found and pid not in seen:
        if pid == os.getpid():
            return True
        seen.add(pid)
        pid = found[pid]["ppid"]
    return False


def _stolen() -> float:
    return getattr(psutil.cpu_times(), "steal", 0.0)
