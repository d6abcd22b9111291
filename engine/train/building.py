"""The training engine of a task."""

from collections.abc import Callable
from functools import partial

import torch

from ssast.engine.errors import ConfigError
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.execution import check_execution
from ssast.engine.train.optim import ema_decay
from ssast.engine.train.task import Task


def build_engine(task: Task) -> TrainEngine:
    """Move a task's module to its device and shard it, its blocks recomputed and compiled as set.

    The teacher, if there is one, follows: in the precision of the module, and with the averages as
    its weights from now on.

    Args:
        task: Module, optimizer, and the run's configuration and processes.

    Raises:
        ConfigError: ``train.cuda_graphs`` is true, and the device is no GPU; or ``train.ema`` is
            set where the objective has a decay of its own, or not where its teacher needs one.
    """
    context, encoder, teacher = task.context, task.encoder, task.teacher
    config, train, device = context.config, context.config.train, context.world.device
    check_execution(config, device)
    decay = averaging(task)
    task.module.to(device)
    if teacher is not None:
        dtype = torch.bfloat16 if context.precision == "bf16" else torch.float32
        for parameter in teacher.to(device).parameters():  # buffers keep their type
            parameter.data = parameter.data.to(dtype)
    encoder.activation_checkpoint_every = train.activation_checkpoint_every
    engine = TrainEngine(
        task.module,
        task.optimizer(),
        world=context.world,
        batch_size=context.batch_size,
        accumulate=train.accumulation_steps,
        zero_stage=train.zero_stage,
        precision=context.precision,
        max_grad_norm=config.optim.max_grad_norm,
        offload=train.offload,
        reduce_dtype=train.reduce_dtype,
        ema_decay=decay,
    )
    if teacher is not None:
        engine.average_into(teacher)
    if train.compile is True:
        for block in task.blocks():
            block.compile()
    return engine


def averaging(task: Task) -> Callable[[int], float] | None:
    """Return the decay of the averages by the optimizer steps taken before; None: none are kept.

    Raises:
        ConfigError: ``train.ema`` and the objective both say what it is, or neither, and there is
            a teacher.
    """
    ema, kind = task.context.config.train.ema, task.context.config.objective.kind
    if task.ema_decay is not None and ema is not None:
        raise ConfigError(
            f"train.ema {ema}: expected null, as objective.kind {kind!r} has a decay of its own"
        )
    if task.teacher is not None and task.ema_decay is None and ema is None:
        raise ConfigError(
            f"train.ema null: expected the decay of the teacher of objective.kind {kind!r}"
        )
    return partial(ema_decay, ema=ema) if ema is not None else task.ema_decay
