"""Writes checkpoints while training goes on."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.errors import CheckpointError
from ssast.engine.parallel.ranks import World, run_on_main
from ssast.pipelines.locks import FolderLock


class Saver:
    """Hands the states of rank 0 to a thread that writes them, one after the other.

    A disk that is full must not end a run of weeks: a checkpoint that cannot be written is told of,
    those before it stay, and the next one is tried in its turn. Only where a run ends is it an
    error.

    Args:
        checkpoints: Where to.
        world: This process's world.
        say: Prints a line.
        lock: Lock of the run's folder; nothing is written once another process has taken over.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        world: World,
        say: Callable[[str], None],
        lock: FolderLock,
    ):
        self._checkpoints, self._world, self._say, self._lock = checkpoints, world, say, lock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        step: int,
        best: float | None,
    ) -> None:
        """Begin to write a checkpoint, after the one before is done.

        Args:
            tensors: On rank 0, the state, which nothing may change any more; see
                :meth:`~ssast.engine.checkpoints.store.Checkpoints.save`, also for the others.
            meta: Likewise.
            step: Number of the checkpoint.
            best: The criterion, if it is the best so far.
        """
        if not self._world.is_main:
            return
        self.settle()
        self._last = self._thread.submit(self._write, tensors, meta, step, best)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Collective.

        Raises:
            CheckpointError: It could not be written.
            FolderInUse: Another process has taken over the run's folder.
        """
        run_on_main(self._result, self._world)

    @property
    def failing(self) -> bool:
        """Whether the run must end, as this process may not write."""
        return self._lock.lost

    def check(self) -> None:
        """Check that the run may go on. Collective.

        Raises:
            FolderInUse: Another process has taken over the run's folder.
        """
        run_on_main(self._lock.check, self._world)

    def settle(self) -> None:
        """Wait for the last checkpoint, whether it could be written or not; on rank 0."""
        if self._last is not None:
            self._last.exception()

    def close(self) -> None:
        """Let the thread finish what it has begun."""
        self._thread.shutdown()

    def _result(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _write(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], step: int, best: float | None
    ) -> None:
        self._lock.check()
        try:
            self._checkpoints.save(tensors, meta, step=step)
            if best is not None:
                self._checkpoints.mark_best(step, best)
        except CheckpointError as error:
            self._say(f"{error}; {self._remaining()}")
            raise
        except (
            Exception
        ) as error:  # of this thread nobody else would hear, of a MemoryError above all
            reason = f"{type(error).__name__} {error}".strip()
            lost = CheckpointError(f"cannot write the checkpoint of step {step}: {reason}")
            self._say(f"{lost}; {self._remaining()}")
            raise lost from error

    def _remaining(self) -> str:
        try:
            found = self._checkpoints.latest()
        except CheckpointError as error:
            return str(error)
        return f"the last one is {found.name}" if found else "there is none before it"
