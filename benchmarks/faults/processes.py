"""The processes of a small run: started often and cheaply, by forking a process that has imported.

Importing PyTorch, DeepSpeed and DALI takes most of the time of a start. A fork server does it once;
each rank is a fork of it, which then runs the ``ssast`` command as any other process does.
"""

import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from ssast.engine.cli.main import main

PRELOADED = (
    "ssast.benchmarks.faults.processes",
    "ssast.engine.pretrain",
    "ssast.pipelines.stream.stream",
    "deepspeed",
    "matplotlib.pyplot",
    "nvidia.dali.fn",
    "torch.utils.tensorboard",
)


class Switches:
    """Two numbers that the processes of a run read from a file while they run.

    They stand in for what one process cannot do to another from outside: seconds that each fsync
    takes, and seconds by which ``time.time()`` is wrong.

    Args:
        path: The file; it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(struct.pack("2d", 0.0, 0.0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    def _get(self, index: int) -> float:
        return float(struct.unpack_from("d", self._memory, 8 * index)[0])

    def set(self, *, fsync_s: float = 0.0, clock_s: float = 0.0) -> None:
        """Set both numbers."""
        struct.pack_into("2d", self._memory, 0, fsync_s, clock_s)

    def obey(self) -> None:
        """Do in this process, from now on, what the numbers say."""
        fsync, clock = os.fsync, time.time

        def slow_fsync(file: int) -> None:
            time.sleep(self._get(0))
            fsync(file)

        os.fsync = slow_fsync  # type: ignore[assignment]
        time.time = lambda: clock() + self._get(1)


def _run_rank(
    arguments: Sequence[str],
    variables: dict[str, str],
    output: tuple[str, str],
    switches: Path,
) -> None:
    """Run the ``ssast`` command in a process of the fork server; what it returns is the status."""
    os.environ.update(variables)
    for target, name in enumerate(output, 1):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(name, flags), target)
    # The streams and the signals of the fork server are those of whatever started it.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Switches(switches).obey()
    sys.exit(main(arguments))


def fork_server() -> ForkServerContext:
    """Return the context in which ranks are started."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Ranks:
    """The processes of one attempt to train.

    Args:
        context: See :func:`fork_server`.
        world_size: Number of ranks.
        arguments: Arguments of the ``ssast`` command.
        logs: Folder for what they print.
        switches: File of the :class:`Switches`.
        stdout: File that takes the output of rank 0 instead of its log.
    """

    def __init__(
        self,
        context: ForkServerContext,
        world_size: int,
        arguments: Sequence[str],
        logs: Path,
        switches: Path,
        *,
        stdout: str | None = None,
    ) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        first = len(list(logs.iterdir()))
        self._logs = [logs / f"{first + rank:05d}.log" for rank in range(world_size)]
        self._read_to = [0] * world_size
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self._logs):
            log.touch()
            output = (stdout if stdout and rank == 0 else str(log), str(log))
            environment = shared | {"RANK": str(rank)}
            process = context.Process(
                target=_run_rank, args=(arguments, environment, output, switches)
            )
            process.start()
            self.processes.append(process)

    def __len__(self) -> int:
        """Return the number of ranks."""
        return len(self.processes)

    @property
    def ended(self) -> bool:
        """Whether any process has exited."""
        return any(process.exitcode is not None for process in self.processes)

    @property
    def all_ended(self) -> bool:
        """Whether all processes have exited."""
        return all(process.exitcode is not None for process in self.processes)

    @property
    def statuses(self) -> list[int | None]:
        """Exit statuses; None of a process that runs, negative after a signal."""
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """Return what all ranks have printed since the last call of :meth:`forget_output`."""
        parts = (
            log.read_bytes()[begin:] for log, begin in zip(self._logs, self._read_to, strict=True)
        )
        return b"".join(parts).decode(errors="replace")

    def forget_output(self) -> None:
        """Let :meth:`output` return only what is printed from now on."""
        self._read_to = [log.stat().st_size for log in self._logs]

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all, as far as they run."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def pids(self) -> list[int]:
        """Return the numbers of the processes that run."""
        return [p.pid for p in self.processes if p.exitcode is None and p.pid is not None]

    def wait(self, limit_s: float) -> float:
        """Wait until all processes have exited by themselves; kill them after a time limit.

        Returns:
            Seconds waited; more than the limit if they had to be killed.
        """
        begin = time.monotonic()
        if until(lambda: self.all_ended, limit_s) is None:
            self.send(signal.SIGKILL)
            for process in self.processes:
                process.join()
        return time.monotonic() - begin


def until(condition: Callable[[], bool], limit_s: float, every_s: float = 0.01) -> float | None:
    """Wait for a condition.

    Returns:
        Seconds waited; None if it was not met in time.
    """
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > limit_s:
            return None
        time.sleep(every_s)
    return time.monotonic() - begin
