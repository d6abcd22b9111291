"""The work of a step for any depth and batch, read off the ledger of a few layers.

The blocks between the first and the last are alike, and of many clips each costs as much as the
next. So two depths and two batches give launches, bytes and FLOPs of any other.
"""

from dataclasses import astuple, dataclass, replace
from functools import cache

import torch

from ssast.engine.config import Config
from ssast.engine.settings import SIZES
from ssast.kernels.attention import Backend

# Matmuls of the backward pass of attention over those that count: scores are computed again. The
# shares of the peak that GPUs reach are published without these; that of a CPU is measured.
ATTENDED_AGAIN = 5 / 4
MANY = (32, 64)  # clips from which on kernels have no more programs, and partial sums, for more


@dataclass(frozen=True)
class Work:
    """Forward and backward pass of one micro-batch.

    Attributes:
        launches: Kernels.
        moved: Bytes read and written besides matmuls, convolutions and attention.
        matmul: FLOPs of matmuls besides attention and convolutions.
        convolution: FLOPs of convolutions.
        attention: FLOPs of attention, on a GPU the backward pass as two forward passes.
    """

    launches: float
    moved: float
    matmul: float
    convolution: float
    attention: float


def work(
    config: Config,
    batch: int,
    every: int | None,
    dtype: torch.dtype,
    cpu_attention: Backend | None = None,
) -> Work:
    """Return the work of one micro-batch.

    Args:
        config: Configuration of the run.
        batch: Clips.
        every: As ``train.activation_checkpoint_every``.
        dtype: Of weights and activations.
        cpu_attention: Backend of attention on the CPU that does it; None: a GPU does.
    """
    cpu = cpu_attention
    depth = config.model.depth or SIZES[config.model.size].depth
    step = every or 1
    few = depth % step + 2 * step if depth % step else 2 * step
    few = max(few, 3 + (3 - depth) % step)
    if depth <= few + step:
        return _at_depth(config, depth, batch, every, dtype, cpu)
    first, second = (_at_depth(config, d, batch, every, dtype, cpu) for d in (few, few + step))
    return _between(first, second, (depth - few) / step)


def _at_depth(
    config: Config,
    depth: int,
    batch: int,
    every: int | None,
    dtype: torch.dtype,
    cpu: Backend | None,
) -> Work:
    config = replace(config, model=replace(config.model, depth=depth))
    if batch <= MANY[1]:
        return _measure(config, batch, every, dtype, cpu)
    first, second = (_measure(config, b, every, dtype, cpu) for b in MANY)
    return _between(first, second, (batch - MANY[0]) / (MANY[1] - MANY[0]))


def _between(first: Work, second: Work, share: float) -> Work:
    pairs = zip(astuple(first), astuple(second), strict=True)
    return Work(*(a + share * (b - a) for a, b in pairs))


@cache
def _measure(
    config: Config, batch: int, every: int | None, dtype: torch.dtype, cpu: Backend | None
) -> Work:
    # Imported here: only plans of steps, not of memory alone, need the modules of training.
    from ssast.engine.planning.ledger import group_of, record_passes

    launches = record_passes(config, batch, every, dtype, cpu).launches
    products = {"matmul": 0.0, "convolution": 0.0, "attention": 0.0}
    moved = 0
    for launch in launches:
        group = group_of(launch)
        if group in products:
            again = group == "attention" and "backward" in launch.name and cpu is None
            products[group] += launch.flops / (ATTENDED_AGAIN if again else 1.0)
        else:
            moved += launch.read + launch.written
            products["matmul"] += launch.flops
    return Work(sum(launch.kernels for launch in launches), moved, **products)
