"""Copies of the averaged weights in another module, such as the teacher of an objective.

Written for DeepSpeed 0.19. ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole
into a partition for each rank; ZeRO 3 cuts each parameter into a share for each rank, and lays the
shares of a rank end to end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssast.engine.parallel.ranks import World


class Piece(NamedTuple):
    """A part of a parameter that lies in one partition of one rank."""

    name: str
    start: int
    """First element, of the flat parameter."""
    size: int
    rank: int
    group: int
    """Index of the partition among those of the rank."""
    offset: int
    """First element, of the partition."""


def find_pieces(module: nn.Module, zero: Any, *, stage: int, world_size: int) -> list[Piece]:
    """Return where the trained parameters of a module lie.

    Args:
        module: The module that DeepSpeed wraps.
        zero: Its ZeRO optimizer.
        stage: 1 to 3.
        world_size: Number of ranks.
    """
    names = {id(param): name for name, param in module.named_parameters()}
    found = list[Piece]()
    if stage == 3:
        for group, params in enumerate(zero.fp16_groups):
            offset = 0
            for param in params:
                size = param.ds_tensor.numel()
                for rank, start in enumerate(range(0, param.ds_numel, size)):
                    length = min(size, param.ds_numel - start)
                    found.append(Piece(names[id(param)], start, length, rank, group, offset))
                offset += size
        return found
    for group, params in enumerate(zero.round_robin_bit16_groups):
        size = zero.bit16_groups_flat[group].numel() // world_size
        for param, first in zip(params, zero.round_robin_bit16_offsets[group], strict=True):
            at, end = first, first + param.numel()
            while at < end:
                rank, offset = divmod(at, size)
                length = min(end - at, size - offset)
                found.append(Piece(names[id(param)], at - first, length, rank, group, offset))
                at += length
    return found


class AveragedCopy:
    """A module whose parameters are set to the averages, where they are in memory.

    Args:
        target: The module: parameters on the device, in one dtype.
        source: The trained module. What it does not train, and its buffers, are copied as they are.
        prefix: Beginning of the names in `source` of the target's parameters.
        pieces: Where the averages lie, from :func:`find_pieces`.
        world: This process's world.
        group: Group of the ranks.

    Raises:
        ValueError: `source` has no parameter of a name, or one of another shape.
    """

    def __init__(
        self,
        target: nn.Module,
        source: nn.Module,
        prefix: str,
        pieces: Sequence[Piece],
        *,
        world: World,
        group: Any,
    ) -> None:
        own = {prefix + name: param for name, param in target.named_parameters()}
        params = dict(source.named_parameters())
        for name, param in own.items():
            shape = None if name not in params else tuple(whole_shape(params[name]))
            if shape != tuple(param.shape):
                raise ValueError(f"{name}: expected shape {shape}, found {tuple(param.shape)}")
        trained = {piece.name for piece in pieces}
        self._params = own
        self._pieces = [piece for piece in pieces if piece.name in own]
        self._fixed = [(p, params[name]) for name, p in own.items() if name not in trained]
        buffers = dict(source.named_buffers())
        self._buffers = [(b, buffers[prefix + n]) for n, b in target.named_buffers()]
        self._world, self._group = world, group

    @torch.no_grad()
    def write(self, averages: Sequence[Tensor], *, fixed: bool) -> None:
        """Set the parameters from this rank's partitions of the averages. Collective.

        On one device they are read where they are. Ranks gather them in the module's dtype, all at
        once.

        Args:
            averages: This rank's partitions.
            fixed: Copy as well what is not trained, which steps do not change.
        """
        shards = self._gather(averages)
        flat = {name: param.detach().view(-1) for name, param in self._params.items()}
        into = [flat[p.name].narrow(0, p.start, p.size) for p in self._pieces]
        given = [shards[p.rank][p.group].narrow(0, p.offset, p.size) for p in self._pieces]
        torch._foreach_copy_(into, given)
        for buffer, value in self._buffers:
            buffer.copy_(value)
        if fixed and self._fixed:
            self._copy_fixed()

    def _gather(self, averages: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return the partitions of each rank, on this rank's device."""
        device, world_size = self._world.device, self._world.world_size
        if world_size == 1 and averages[0].device == device:
            return [averages]
        sizes = [average.numel() for average in averages]
        dtype = next(iter(self._params.values())).dtype
        share = torch.empty(sum(sizes), dtype=dtype, device=device)
        for part, average in zip(share.split(sizes), averages, strict=True):
            part.copy_(average)
        if world_size == 1:
            return [share.split(sizes)]
        shares = share.new_empty(world_size * len(share))
        dist.all_gather_single(shares, share, group=self._group)
        return [row.split(sizes) for row in shares.chunk(world_size)]

    def _copy_fixed(self) -> None:
        from deepspeed import zero

        sources = [source for _, source in self._fixed]
        sharded = hasattr(sources[0], "ds_id")
        with zero.GatheredParameters(sources, enabled=sharded):
            for target, source in self._fixed:
                target.copy_(source)


def whole_shape(param: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter that stage 3 may have partitioned."""
    return getattr(param, "ds_shape", param.shape)
