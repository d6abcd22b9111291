"""Repeat reads while storage fails: a network that is down for a minute must not end a run."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ssast.pipelines.errors import TRANSIENT, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES_S = (0.05, 10.0)  # the first, and the longest; each is about twice the one before
QUIET_S = 1.0  # shorter failures are not worth a line


class Retry:
    """Repetition of reads for as long as storage fails. Thread-safe.

    Args:
        limit_s: Time in s from the first failure of a read to its last attempt.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._stopped = threading.Event()
        self._failing_since: float | None = None  # of the failure that was told of
        self._lock, self._random = threading.Lock(), random.Random()

    def call(self, read: Callable[[], T], name: object) -> T:
        """Return what ``read`` returns, repeated while it raises one of :data:`TRANSIENT`.

        Args:
            read: The read.
            name: What is read, for messages.

        Raises:
            StorageError: Storage failed until the time was over.
            OSError: The read failed for another reason.
        """
        since, pause_s = None, PAUSES_S[0]
        while True:
            try:
                result = read()
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                now = time.monotonic()
                since = now if since is None else since
                left_s = self.limit_s - (now - since)
                reason = error.strerror or str(error)
                if left_s <= 0 or self._stopped.is_set():
                    raise StorageError(
                        f"{name}: {reason}: storage has failed for {now - since:.3g} s "
                        "(data.retry_s); run it again, training with --resume"
                    ) from error
                if now - since > QUIET_S:
                    self._failing(since, f"{name}: {reason}")
            else:
                if since is not None:
                    self._working()
                return result
            # Of many threads and ranks, not all must ask again in the same moment.
            self._stopped.wait(min(left_s, pause_s * self._random.uniform(0.75, 1.25)))
            pause_s = min(2 * pause_s, PAUSES_S[1])

    def stop(self) -> None:
        """End the waiting of all threads: their reads fail."""
        self._stopped.set()

    def _failing(self, since: float, what: str) -> None:
        with self._lock:
            told, self._failing_since = self._failing_since, self._failing_since or since
        if told is None:
            log.warning("%s: storage fails: trying again for %g s", what, self.limit_s)

    def _working(self) -> None:
        with self._lock:
            since, self._failing_since = self._failing_since, None
        if since is not None:
            log.warning("storage works again after %.0f s", time.monotonic() - since)
