"""A sum over ranks that nothing waits for until it is needed."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssast.engine.parallel.ranks import World


class PendingSum:
    """A sum over the ranks that the host reads without letting the device run out of work.

    Args:
        count: A count of this rank, a scalar on its device.
        group: Group of the ranks.
        world: This process's world.
    """

    def __init__(self, count: Tensor, group: Any, world: World):
        self._total = self._host = count.clone()
        self._work: Any = None
        self._copied: torch.cuda.Event | None = None
        if world.world_size > 1:
            self._work = dist.all_reduce(self._total, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the sum on the device, whose later work waits for it; the host does not."""
        if self._work is not None:
            self._work.wait()
        if self._total.is_cuda:
            self._host = torch.empty_like(self._total, device="cpu", pin_memory=True)
            self._host.copy_(self._total, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._total

    def read(self) -> int:
        """Return the sum, after :meth:`wait`; only what the device did before that is awaited."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._host)
