"""The training engine of a task."""

from functools import partial

from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.train.execution import check_execution
from ssast.engine.train.optim import ema_decay
from ssast.engine.train.task import Task


def build_engine(task: Task) -> TrainEngine:
    """Move a task's module to its device and shard it, its blocks recomputed and compiled as set.

    Args:
        task: Module, optimizer, and the run's configuration and processes.

    Raises:
        ConfigError: ``train.cuda_graphs`` is true, and the device is no GPU.
    """
    context, encoder = task.context, task.encoder
    config, train = context.config, context.config.train
    check_execution(config, context.world.device)
    task.module.to(context.world.device)
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
        ema_decay=None if train.ema is None else partial(ema_decay, ema=train.ema),
    )
    if train.compile is True:
        for block in encoder.blocks:
            block.compile()
    return engine
