"""Requests to stop a run: by signals, or since its checkpoints cannot be written."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ssast.engine.parallel.ranks import World, reduce_max
from ssast.pipelines.text import in_notebook

ASK_EVERY = 16  # validation batches, where asking other ranks waits for the device


class Stop:
    """Set by SIGINT, SIGTERM or SIGUSR1 (batch systems warn with it); a second one acts at once.

    In a notebook, whose kernel goes on, a second one does what it did before the run: SIGINT raises
    KeyboardInterrupt. Python delivers signals to its main thread alone, so a run in another thread
    is not stopped by them.

    Attributes:
        signal: Number of the signal that a rank has caught, as of the last :meth:`requested`; 0 if
            there was none.
        failing: Whether this process must give the run up; replaced by whoever can tell.
        ending: Whether this process wants training to end here; likewise.
        ends: Whether any rank does, as of the last :meth:`requested`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = self._caught = 0
        self._before: dict[int, Any] = {}
        self.failing: Callable[[], bool] = lambda: False
        self.ending: Callable[[], bool] = lambda: False
        self.ends = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside, then put the handlers before back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {s: signal.signal(s, self._catch) for s in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
        signal.signal(number, self._before[number] if in_notebook() else signal.SIG_DFL)

    def requested(self, world: World) -> bool:
        """Return whether any rank has been asked to stop, or must give the run up. Collective."""
        flags = [self._caught, self.failing(), self.ending()]
        signal, failing, ending = reduce_max(flags, world)
        self.signal, self.ends = int(signal), ending != 0
        return signal != 0 or failing != 0

    def requested_in_validation(self, batch: int, world: World) -> bool:
        """Return :meth:`requested`, asked for at some batches only where that is slow. Collective.

        Args:
            batch: Number of the batch, the same on all ranks.
            world: This process among all processes.
        """
        cheap = world.world_size == 1 or world.device.type == "cpu"
        return (cheap or batch % ASK_EVERY == 0) and self.requested(world)
