"""One optimizer step, and one pass over held-out clips."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssast.engine.errors import Stopped
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import World, reduce_sum
from ssast.engine.train.task import Task
from ssast.pipelines.stream.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """The forward pass of one micro-batch.

    Attributes:
        clip_ids: [B] rows of the manifest.
        valid: [B] bool, the clips that count.
        outputs: Values of the module per clip, each [B, ...].
        means: Scalar means over the clips that count.
    """

    clip_ids: Tensor
    valid: Tensor
    outputs: dict[str, Tensor]
    means: dict[str, Tensor]


def train_step(
    task: Task,
    engine: TrainEngine,
    batches: Iterator[Batch],
    lr: float,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[bool, list[MicroBatch]]:
    """Take one optimizer step, along the gradient of the mean over its valid clips.

    The mean is one over all micro-batches and ranks, and each clip has the same weight in it,
    however many of its frames are padding. Each micro-batch counts by its share of valid clips;
    the accumulated gradient is divided by the share of the whole step.

    Args:
        task: Draws masks or augmentations, and averages the losses.
        engine: Holds the task's module and its optimizer.
        batches: Training batches; as many are taken as gradients are accumulated over.
        lr: Learning rate.
        mark: Told each part of the step as it begins: a key of
            :data:`ssast.engine.monitoring.profiling.PARTS`.

    Returns:
        Whether the weights changed: not if a gradient was not finite on some rank, nor if no clip
        of the step is valid. And the micro-batches of this rank.
    """
    updated, micro_batches = False, list[MicroBatch]()
    counted = torch.zeros((), dtype=torch.int64, device=engine.world.device)
    for number in range(1, engine.accumulate + 1):
        mark("data")
        batch = next(batches)
        mark("inputs")
        inputs, valid = task.inputs(batch, training=True)
        count = valid.sum()
        counted += count
        pending = engine.sum_over_ranks(counted) if number == engine.accumulate else None
        outputs = engine(*inputs)
        # Exactly 1 where all clips are valid, which leaves every bit as it is.
        weight, included = count / len(valid), valid
        if pending is not None:
            # Without a valid clip the gradient is made NaN, not 0, so that the step is skipped.
            empty = pending.wait() == 0
            weight, included = weight.where(~empty, math.nan), valid | empty
        means = task.means(outputs, included)
        mark("backward")
        engine.backward(means["loss"] * weight)
        mark("optimizer")
        if pending is None:
            engine.step(lr)  # accumulates
        else:
            clips = len(valid) * engine.accumulate * engine.world.world_size
            updated = engine.step(lr, max(pending.read(), 1) / clips)
        micro_batches.append(MicroBatch(batch.clip_ids, valid, outputs, means))
    mark("other")
    return updated, micro_batches


@torch.no_grad()
def evaluate(
    task: Task,
    engine: TrainEngine,
    batches: Iterator[Batch],
    watch: Callable[[Batch, dict[str, Tensor], Tensor], None] = lambda *_: None,
) -> dict[str, float]:
    """Return means over held-out clips. Collective.

    Args:
        task: Prepares inputs, and averages the losses.
        engine: Holds the task's module.
        batches: One pass over the clips.
        watch: Given each batch, the module's outputs for it, and which of its clips count.

    Raises:
        Stopped: The run was asked to stop; on all ranks.
    """
    totals, context = Totals(engine.world.device), task.context
    engine.train(False)
    context.heartbeat("a validation")
    try:
        for number, batch in enumerate(batches):
            context.heartbeat("a validation")
            inputs, valid = task.inputs(batch, training=False)
            outputs = engine(*inputs)
            watch(batch, outputs, valid)
            totals.add(task.means(outputs, valid), valid)
            if context.stop.requested_in_validation(number, engine.world):
                raise Stopped("a validation was abandoned")
    finally:
        engine.train(True)
    return totals.read(engine.world)


class Totals:
    """Sums over clips that stay on the device until they are read."""

    def __init__(self, device: torch.device):
        self._sums, self._names = torch.zeros(0, device=device), list[str]()

    def add(self, means: dict[str, Tensor], valid: Tensor, counts: bool = True) -> None:
        """Add the means over the valid clips of one batch, or only take note of their names."""
        count = valid.sum()
        values = [count, *(value.detach() * count for value in means.values())]
        row = torch.stack([v.to(torch.float64) for v in values])
        if self._names != list(means):
            self._names, self._sums = list(means), torch.zeros_like(row)
        if counts:
            self._sums += row

    def gather(self, world: World) -> tuple[list[str], list[float]]:
        """Return the names and the sums over all ranks, for a checkpoint. Collective."""
        return self._names, reduce_sum(self._sums.tolist(), world)

    def load(self, names: list[str], sums: list[float], world: World) -> None:
        """Go on from what :meth:`gather` returned, on any number of ranks."""
        self._names = list(names)
        own = torch.tensor(sums, dtype=torch.float64, device=self._sums.device)
        self._sums = own if world.is_main else torch.zeros_like(own)

    def read(self, world: World, **latest: Tensor | float) -> dict[str, float]:
        """Return means over the clips of all ranks since the last call, NaN of none. Collective.

        Args:
            world: This process among all processes.
            latest: Scalars that are the same on all ranks, which are returned as well.
        """
        scalars = [torch.as_tensor(value).to(self._sums).view(1) for value in latest.values()]
        # One copy: reading each value by itself would wait for the device each time.
        values = torch.cat([self._sums, *scalars]).tolist()
        count, *sums = reduce_sum(values[: len(self._sums)], world)
        self._sums.zero_()
        means = [total / count if count else math.nan for total in sums]
        return dict(zip([*self._names, *latest], means + values[1 + len(means) :], strict=True))
