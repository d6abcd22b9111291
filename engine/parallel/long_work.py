"""Work of some ranks that may take longer than the timeout of a collective."""

import time
from collections.abc import Callable
from typing import TypeVar

from ssast.engine.parallel.ranks import World, gather_objects, reduce_max

T = TypeVar("T")
MEET_S = 5.0  # between two meetings of ranks that wait for one of them


def run_long(work: Callable[[Callable[[], None]], T], world: World, *, here: bool) -> T:
    """Call a function on some ranks; what it says reaches every rank. Collective.

    It calls what it is given often: then the ranks meet every few seconds.

    Args:
        work: The function; its result is small and picklable.
        world: This process's world.
        here: Whether this rank calls it. Rank 0 must; for once a machine, those of local rank 0.

    Returns:
        The result of rank 0.

    Raises:
        ValueError: The function raised it (or a subclass) on some rank.
        OSError: Likewise.
        RuntimeError: Likewise; or a rank is gone.
    """
    if world.world_size == 1:
        return work(lambda: None)
    outcome: tuple[T | None, ValueError | OSError | RuntimeError | None] = (None, None)
    met, lost = time.monotonic(), False

    def tick() -> None:
        nonlocal met, lost
        if time.monotonic() - met > MEET_S:
            lost = True  # unless it comes back from there
            reduce_max([1.0], world)  # not done yet
            met, lost = time.monotonic(), False

    if here:
        try:
            outcome = (work(tick), None)
        except (ValueError, OSError, RuntimeError) as error:
            if lost:
                raise
            outcome = (None, error)
    while reduce_max([0.0], world)[0]:
        pass
    outcomes = gather_objects(outcome, world)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return outcomes[0][0]  # type: ignore[return-value]
