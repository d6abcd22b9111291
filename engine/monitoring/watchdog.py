"""Watchdog that ends a hung process and reports where it hung."""

import faulthandler
import os
import threading
import time
from pathlib import Path

from ssast.pipelines.text import print_error

EX_TEMPFAIL = os.EX_TEMPFAIL  # 75
"""Exit status of a run that hung or lost a process: run it again with --resume."""


class Watchdog:
    """Ends the process with exit status 75 when the time limit between heartbeats is exceeded.

    It is a thread, since the main thread hangs in a collective, a disk or a decoder. The stack
    traces of all threads are written to a file.

    Args:
        timeout_s: Time limit between heartbeats in s.
        report: File for the stack traces; its folder exists.
        name: Name of this process, for the message.
    """

    def __init__(self, timeout_s: float, report: Path, name: str):
        self._timeout_s, self._report, self._name = timeout_s, report, name
        self._doing, self._since = "starting", time.monotonic()
        self._over = threading.Event()

    def heartbeat(self, doing: str) -> None:
        """Restart the time limit, before something that may hang."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Start the watchdog."""
        self.heartbeat(self._doing)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the watchdog."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._since > self._timeout_s:
                self._end()

    def _end(self) -> None:
        try:
            with self._report.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stack traces are in {self._report}"
        except OSError as error:
            where = str(error)
        print_error(
            f"ssast: error: {self._name}: {self._doing} took longer than train.timeout_s "
            f"({self._timeout_s:g} s); {where}; run the same command again with --resume"
        )
        os._exit(EX_TEMPFAIL)  # the thread that hangs cannot clean up
