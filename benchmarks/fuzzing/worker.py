"""A process that gives mutated inputs to readers, and the one that watches over it."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from ssast.benchmarks.fuzzing.mutations import Files
from ssast.benchmarks.fuzzing.reading import (
    Limits,
    Reader,
    Result,
    attempt,
    make_input,
    memory_mib,
    write_files,
)

STARTED_S = 120  # for imports, and to make and read the seeds
PATIENCE = 6  # times as long by the clock as of its own time
ENDED_S = 0.5  # for a process that waits for its next input
LOG, CASE = "worker.log", "case"
UNLIMITED = Limits(memory_mib=float("inf"))


def serve(
    connection: Connection, readers: Mapping[str, Reader], folder: Path, seed: int, limits: Limits
) -> None:
    """Answer each name of a reader and the number of an input with the result.

    Before its first input a reader reads all of its seeds. With a path in place of a number the
    files of this folder are read.
    """
    log = os.open(folder / LOG, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    seeds: dict[str, list[Files]] = {}
    case = folder / CASE
    while (message := connection.recv()) is not None:
        name, wanted = message
        reader = readers[name]
        if name not in seeds:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            seeds[name] = reader.seeds()
            problem = None
            for files in seeds[name]:
                write_files(case, reader.pack(files))
                found = attempt(reader.read, case, UNLIMITED)
                if found.outcome != "accepted":
                    problem = f"a seed of {name}, {', '.join(files)}, is not read: {found.detail}"
            gc.collect()
            most = int((memory_mib("VmSize") + limits.address_mib) * 2**20)
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            connection.send(problem)
        elif isinstance(wanted, Path):
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(wanted, case)
            connection.send(attempt(reader.read, case, limits))
        else:
            write_files(case, make_input(name, reader, seeds[name], seed, wanted))
            connection.send(attempt(reader.read, case, limits))


class Worker:
    """A process for some readers, which is started again when an input ended it.

    Args:
        readers: The readers by name.
        folder: Folder for its files; the last input stays in ``case``.
        seed: Seed of the mutations.
        limits: Limits of each input.
    """

    def __init__(
        self, readers: Mapping[str, Reader], folder: Path, seed: int, limits: Limits
    ) -> None:
        self.readers, self.folder, self.seed, self.limits = readers, folder, seed, limits
        folder.mkdir(parents=True, exist_ok=True)
        self._launch()

    def _launch(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self.readers, self.folder, self.seed, self.limits)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._started: set[str] = set()

    def _start(self, name: str) -> None:
        """Have the process make and read the seeds of a reader.

        Raises:
            RuntimeError: It cannot.
        """
        self._connection.send((name, None))
        try:
            problem = "it hangs"
            if self._connection.poll(STARTED_S):
                problem = self._connection.recv()
        except (EOFError, ConnectionError):
            problem = f"it ended: {self._last_words()}"
        if problem is not None:
            raise RuntimeError(f"the seeds of {name}: {problem}")
        self._started.add(name)

    def run(self, name: str, wanted: int | Path) -> Result:
        """Give a reader the input of a number, or the files of a folder.

        Raises:
            RuntimeError: The reader does not read its own seeds.
        """
        if name not in self._started:
            self._start(name)
        begin = time.monotonic()
        try:
            self._connection.send((name, wanted))
            if self._answers():
                found = self._connection.recv()
                return replace(found, seconds=time.monotonic() - begin)
            found = Result("hang", f"no answer in {time.monotonic() - begin:.0f} s")
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            cause = signal.Signals(-code).name if code < 0 else f"status {code}"
            found = Result("crash", f"{cause}: {self._last_words()}")
        self.close()
        self._launch()
        return replace(found, seconds=time.monotonic() - begin)

    def _answers(self) -> bool:
        """Wait for an answer, for longer while the machine gives the process no time."""
        seconds, waited = self.limits.seconds, 0.0
        process = psutil.Process(self._process.pid)
        before = sum(process.cpu_times()[:2])
        while waited < PATIENCE * seconds:
            if self._connection.poll(seconds / 2):
                return True
            waited += seconds / 2
            with contextlib.suppress(psutil.Error):
                if sum(process.cpu_times()[:2]) - before > seconds:
                    return False
        return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
            return " | ".join(line.strip() for line in lines[:6])[:400]
        return ""

    def close(self) -> None:
        """End the process with all that it has started; what it does now is not waited for."""
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(None)
        self._process.join(ENDED_S)
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._process.kill()
        self._process.join()
        self._connection.close()
