"""Two processes that form a world and run jobs for tests: started once, used by many."""

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _serve(rank, size, port, output, connection):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)  # what any library prints is kept and can be asked for
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from ssast.engine.parallel.ranks import close_world, init_world

    torch.set_num_threads(1)
    world = init_world(timeout_s=60)
    while (job := connection.recv()) is not None:
        function, args = job
        try:
            answer = (True, function(world, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        connection.send(answer)
    close_world()


class RankPool:
    """`run(function, *args)` calls function(world, *args) on every rank; the list of results.

    The function lives in a module of the tests folder. After a failure the processes are
    replaced, since the other rank may hang in a collective.
    """

    def __init__(self, size: int):
        self.size = size
        self.outputs: list[Path] = []
        self.processes = []
        self._connections = []

    def run(self, function, *args):
        if not self.processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        try:
            answers = [connection.recv() for connection in self._connections]
        except EOFError:
            self.close(kill=True)
            raise
        failures = [text for succeeded, text in answers if not succeeded]
        if failures:
            self.close(kill=True)
            raise AssertionError("\n".join(failures))
        return [value for _, value in answers]

    def printed(self) -> str:
        return "".join(path.read_text() for path in self.outputs)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        folder, port = Path(tempfile.mkdtemp(prefix="ranks-")), free_port()
        self.outputs = [folder / f"stdout{rank}" for rank in range(self.size)]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.size, port, str(self.outputs[rank]), theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)

    def close(self, kill: bool = False):
        for process, connection in zip(self.processes, self._connections, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                connection.send(None)
            process.join(30)
            connection.close()
        self.processes, self._connections = [], []
