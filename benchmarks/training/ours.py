"""Our training step on one batch, with DeepSpeed or with plain PyTorch in its place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssast.benchmarks.device import CPU
from ssast.engine.config import Config
from ssast.engine.parallel.pending_sum import PendingSum
from ssast.engine.parallel.ranks import World, init_world
from ssast.engine.planning.synthetic import SyntheticContext, synthetic_task
from ssast.engine.train.building import build_engine
from ssast.engine.train.execution import Execution, start_execution
from ssast.engine.train.pretraining import Pretraining
from ssast.engine.train.step import train_step
from ssast.engine.train.task import Task
from ssast.kernels.masking import masks_from_ids
from ssast.pipelines.stream.batch import Batch


class OurStep:
    """The step of ``ssast pretrain``, or of ``ssast finetune``, on the same filterbanks each time.

    Args:
        config: Configuration of the run, but for the batch.
        fbank: [B, T, F] filterbanks of this process.
        deepspeed: Take the step with DeepSpeed, as training does; else with plain PyTorch.
        device: What computes; DeepSpeed takes the GPU of the process, if there is one.
    """

    def __init__(
        self, config: Config, fbank: Tensor, *, deepspeed: bool = False, device: torch.device = CPU
    ):
        world = init_world() if deepspeed else World(0, 0, 1, "single", device)
        train = replace(config.train, batch_size=len(fbank) * world.world_size)
        context = SyntheticContext(replace(config, train=train), world, fbank=fbank)
        clips = [""] * len(fbank)
        pretraining = config.finetune is None
        self.task = _GivenMasks(context, clips, clips) if pretraining else synthetic_task(context)
        self.engine: Any = build_engine(self.task) if deepspeed else _PlainEngine(self.task)
        self.batches = context.batches()

    def start_execution(self, steps: int) -> Execution:
        """Choose how the training pass is executed, as a run of so many steps would."""
        execution, self.batches = start_execution(self.task, self.batches, steps=steps)
        return execution

    def __call__(
        self, mask_ids: Tensor | None = None, mark: Callable[[str], None] = lambda part: None
    ) -> float:
        """Train once; return the loss, for which the host waits. See :meth:`take`."""
        return self.take(mask_ids, mark).item()

    def take(
        self, mask_ids: Tensor | None = None, mark: Callable[[str], None] = lambda part: None
    ) -> Tensor:
        """Train once; return the loss.

        Args:
            mask_ids: [B, M] masks that take the place of those drawn, which are drawn all the same.
            mark: Told each part of the step; see :func:`ssast.engine.train.step.train_step`.
        """
        if isinstance(self.task, _GivenMasks):
            self.task.mask_ids = mask_ids
        lr = self.task.context.config.optim.lr
        _, micro_batches = train_step(self.task, self.engine, self.batches, lr, mark)
        return micro_batches[0].means["loss"].detach()


class _GivenMasks(Pretraining):
    mask_ids: Tensor | None = None

    def inputs(self, batch: Batch, *, training: bool) -> tuple[tuple[Any, ...], Tensor]:
        (fbank, *masks), valid = super().inputs(batch, training=training)
        if self.mask_ids is not None:
            rows, columns = self.module.grid
            masks = [masks_from_ids(self.mask_ids, rows * columns)]
        return (fbank, *masks), valid


class _PlainEngine:
    """What the step needs of :class:`TrainEngine`, on one process."""

    accumulate = 1

    def __init__(self, task: Task):
        self.world = task.context.world
        self.module = task.module.to(self.world.device)
        if task.context.precision == "bf16":
            self.module.to(torch.bfloat16)
        self.optimizer = task.optimizer()

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    def sum_over_ranks(self, count: Tensor) -> PendingSum:
        return PendingSum(count, None, self.world)

    def step(self, lr: float, grad_scale: float) -> bool:
        assert grad_scale == 1.0  # every clip is valid
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        return True
