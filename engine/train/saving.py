"""Writes checkpoints while training goes on."""

import hashlib
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.config import Config
from ssast.engine.errors import CheckpointError, ConfigError, SaveError
from ssast.engine.parallel.ranks import World, run_on_main
from ssast.engine.train.task import run_folder
from ssast.pipelines.errors import PASSING
from ssast.pipelines.files import write_atomically
from ssast.pipelines.locks import FolderLock

_log = logging.getLogger(__name__)


class Saver:
    """Hands the states of rank 0 to a thread that writes them, one after the other.

    A disk that is full must not end a run of weeks: a checkpoint that cannot be written is told of,
    those before it stay, and the next one is tried in its turn. Only where a run ends, or where
    ``max_failed`` in a row could not be written, is it an error; the state is then written to the
    fallback folder, if there is one.

    Args:
        checkpoints: Where to.
        world: This process's world.
        say: Prints a line.
        lock: Lock of the run's folder; nothing is written once another process has taken over.
        max_failed: Number of consecutive checkpoints that cannot be written.
        fallback: Where to at last.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        world: World,
        say: Callable[[str], None],
        lock: FolderLock,
        *,
        max_failed: int,
        fallback: Checkpoints | None = None,
    ):
        self._checkpoints, self._world, self._say, self._lock = checkpoints, world, say, lock
        self._max_failed, self._fallback = max_failed, fallback
        self._num_failed = 0  # in a row
        self._given_up: CheckpointError | None = None
        self._discarded = False
        self._best = -math.inf  # of the marked checkpoint; until that is known, none is better
        self._unmarked: tuple[int, float] | None = None  # on the disk, and the best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._written = deque[Path]()

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        *,
        step: int,
        best: float | None,
        last: bool = False,
    ) -> None:
        """Begin to write a checkpoint, after the one before is done.

        Args:
            tensors: On rank 0, the state, which nothing may change any more; see
                :meth:`~ssast.engine.checkpoints.store.Checkpoints.save`, also for the others.
            meta: Likewise.
            step: Number of the checkpoint.
            best: The criterion, if no checkpoint on the disk has a lower one.
            last: Whether the run ends after it.
        """
        if not self._world.is_main:
            return
        self.settle()
        self._last = self._thread.submit(self._write, tensors, meta, step, best, last)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Collective.

        Raises:
            CheckpointError: It could not be written.
            FolderInUse: Another process has taken over the run's folder.
        """
        run_on_main(self._result, self._world)

    @property
    def failing(self) -> bool:
        """Whether the run must end, see :meth:`check`; on rank 0."""
        return self._given_up is not None or self._lock.lost

    def check(self) -> None:
        """Check that the run may go on. Collective.

        Raises:
            CheckpointError: ``max_failed`` checkpoints in a row could not be written.
            FolderInUse: Another process has taken over the run's folder.
        """
        run_on_main(self._check, self._world)

    def best_value(self) -> float:
        """Return the lowest criterion of the checkpoints on the disk. Collective."""
        return run_on_main(self._best_value, self._world)

    def settle(self) -> None:
        """Wait for the last checkpoint, whether it could be written or not; on rank 0."""
        if self._last is not None:
            self._last.exception()

    def take_written(self) -> Iterator[Path]:
        """Yield the checkpoints that were written since the last call; on rank 0."""
        while self._written:
            yield self._written.popleft()

    def close(self) -> None:
        """Let the thread finish what it has begun."""
        self._thread.shutdown()

    def _result(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _check(self) -> None:
        self._lock.check()
        if self._given_up is not None:
            raise self._given_up

    def _best_value(self) -> float:
        self.settle()
        try:
            self._best = self._checkpoints.best_value()
        except CheckpointError as error:  # what was read before holds
            self._say(str(error))
        return self._best if self._unmarked is None else min(self._best, self._unmarked[1])

    def _write(
        self,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        step: int,
        best: float | None,
        last: bool,
    ) -> None:
        self._check()
        self._mark()
        meta = {**meta, "best": best}
        try:
            path = self._checkpoints.save(tensors, meta, step=step)
        except Exception as error:  # nobody else would hear of it, of a MemoryError above all
            raise self._failed(error, tensors, meta, step, last) from error
        self._written.append(path)
        self._num_failed = 0
        self._discard_fallback(step)
        if best is not None:
            self._unmarked = (step, best)
            self._mark(needed=last)

    def _mark(self, *, needed: bool = False) -> None:
        """Mark the best checkpoint; one that could not be marked is tried again at the next save.

        Raises:
            CheckpointError: It cannot be marked, and is ``needed``.
        """
        if self._unmarked is None:
            return
        try:
            self._checkpoints.mark_best(*self._unmarked)
            self._unmarked = None
        except CheckpointError as error:
            self._say(str(error))
            if needed:
                raise

    def _failed(
        self,
        error: Exception,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        step: int,
        last: bool,
    ) -> CheckpointError:
        """Tell of a checkpoint that could not be written, and try the fallback at the end."""
        self._num_failed += 1
        if not isinstance(error, CheckpointError):
            reason = f"{type(error).__name__} {error}".strip()
            text = f"cannot write the checkpoint of step {step}: {reason}"
        else:
            text = str(error)
        self._say(f"{text}; {self._remaining()}")
        giving_up = self._num_failed >= self._max_failed
        if giving_up and not last:
            text = f"{self._num_failed} checkpoints in a row could not be written, the last: {text}"
        if (giving_up or last) and self._fallback is not None:
            text += f"; {self._save_fallback(tensors, meta, step)}"
        failure = (SaveError if _is_passing(error) else CheckpointError)(text)
        if giving_up:
            self._given_up = failure
        return failure

    def _save_fallback(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], step: int
    ) -> str:
        """Write a state to the fallback folder; return what became of it."""
        assert self._fallback is not None
        try:
            path = self._fallback.save(tensors, meta, step=step)
        except Exception as error:
            return f"train.fallback_folder: {error or type(error).__name__}"
        return f"the state is in {path}: --resume with the same train.fallback_folder takes it up"

    def _discard_fallback(self, step: int) -> None:
        """Remove, once, what was written to the fallback folder before the run was resumed."""
        if self._fallback is None or self._discarded:
            return
        self._discarded = True
        try:
            self._fallback.discard(step)
        except CheckpointError as error:
            self._say(str(error))

    def _remaining(self) -> str:
        try:
            found = self._checkpoints.latest()
        except CheckpointError as error:
            return str(error)
        return f"the last one is {found.name}" if found else "there is none before it"


def fallback_checkpoints(config: Config) -> Checkpoints | None:
    """Return a run's checkpoints in ``train.fallback_folder``; None without that setting.

    They are in a folder of the run's name and a hash of its path, as runs may share the setting.

    Raises:
        ConfigError: It is inside the folder of the run.
    """
    if config.train.fallback_folder is None:
        return None
    run = Path(os.path.realpath(run_folder(config)))
    given = Path(os.path.expanduser(config.train.fallback_folder))
    if Path(os.path.realpath(given)).is_relative_to(run):
        raise ConfigError(
            f"train.fallback_folder {given} is inside run.folder: expected a folder on another disk"
        )
    digest = hashlib.blake2b(os.fsencode(run), digest_size=4).hexdigest()
    return Checkpoints(given / f"{run.name}-{digest}", keep=1)


def check_fallback(fallback: Checkpoints, run: Path) -> None:
    """Check that the fallback folder can be written to, and warn if it is on the run's disk.

    Raises:
        ConfigError: It cannot be written to.
    """
    folder = fallback.folder
    try:
        write_atomically(folder / "probe", b"")
        (folder / "probe").unlink()
        same_disk = os.stat(folder).st_dev == os.stat(run).st_dev
    except OSError as error:
        raise ConfigError(
            f"train.fallback_folder {folder.parent}: cannot be written to: {error.strerror}"
        ) from error
    if same_disk:
        _log.warning("train.fallback_folder %s is on the disk of run.folder", folder.parent)


def _is_passing(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is of storage that may work again later."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno in PASSING
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors
            return int(found[1]) in PASSING
        error = error.__cause__
    return False
