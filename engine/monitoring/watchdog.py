"""Ends a process that hangs, and says in what it hung."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

STUCK = 75
"""Exit status of a run that hung or lost a process (sysexits.h: a temporary failure): start it
again with --resume."""


class Watchdog:
    """Ends the process with status 75 when nothing has moved for too long.

    A thread of its own, since a main thread that waits for a collective, a disk or a decoder cannot
    look at a clock. Where every thread was goes to a file.

    Args:
        timeout_s: Seconds from one sign of life to the next.
        report: The file; its folder exists.
        name: Of this process, for the message.
    """

    def __init__(self, timeout_s: float, report: Path, name: str):
        self._timeout_s, self._report, self._name = timeout_s, report, name
        self._doing, self._since = "starting", time.monotonic()
        self._over = threading.Event()

    def beat(self, doing: str) -> None:
        """A sign of life, before something that may hang."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        self.beat(self._doing)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._since > self._timeout_s:
                self._end()

    def _end(self) -> None:
        try:
            with self._report.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"where it was is in {self._report}"
        except OSError as error:
            where = str(error)
        print(
            f"ssast: error: {self._name}: {self._doing} has taken more than {self._timeout_s:g} s "
            f"(train.timeout_s); {where}; start again with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STUCK)  # the thread that hangs cannot clean up
