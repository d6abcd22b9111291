"""How the ranks of one attempt find each other in a store that outlives attempts.

torchrun --max-restarts keeps one store, in which the next attempt would dial the addresses of the
one before. Its count of restarts tells attempts apart on one machine only: where a machine was
replaced, or restarts because another one did, the counts of the machines differ
(github.com/pytorch/pytorch/issues/135712).
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.02


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that the ranks which are here now have in common, and none before them had.

    Each rank says hello under a name of its own, and rank 0 answers each hello with the name of the
    attempt, until every rank has heard it. Hellos of ranks that are gone are answered in vain.

    Args:
        store: Which all ranks see.
        rank: Of this process.
        world_size: How many ranks there are.
        timeout_s: How long the others are waited for.

    Raises:
        torch.distributed.DistError: They did not come in time.
    """
    own, name = uuid.uuid4().hex, uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", own)
        store.wait([f"attempt/{own}"], timedelta(seconds=timeout_s))
        name = store.get(f"attempt/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    missing, end = set(range(1, world_size)), time.monotonic() + timeout_s
    answered: dict[int, bytes] = {}
    while missing:
        for other in sorted(missing):
            hello = store.get(f"hello/{other}") if store.check([f"hello/{other}"]) else None
            if hello is not None and hello != answered.get(other):
                store.set(f"attempt/{hello.decode()}", name)
                answered[other] = hello
            if store.check([f"heard/{name}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > end:
            ranks = ", ".join(map(str, sorted(missing)[:8]))
            raise dist.DistError(f"rank {ranks} did not come in {timeout_s:g} s")
        if missing:
            time.sleep(POLL_S)
    return name
