"""What is said of a batch that leaves a GPU waiting for its host, and of the one that fills it.

A micro-batch fills a GPU when its matmuls are large, and when the host, which launches kernels and
runs DeepSpeed beside the device, is done in half of the device's time.
"""

import math
from dataclasses import dataclass

from ssast.engine.config import Config
from ssast.engine.monitoring.flops import encoded_tokens
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.planning.plan import Choice, Parameters, StepTime, largest_batch, step_time

TOKENS = 32_768  # of a micro-batch: what published runs of small models have at least
HOST_SHARE = 0.5  # of the device's time


@dataclass(frozen=True)
class Advice:
    """The batch that fills each GPU, and what it means for the learning rate.

    Attributes:
        time: Step of the batch that was to be planned.
        batch: Clips of one GPU in one micro-batch; None if none that fits is enough.
        batch_size: Clips of a step, over all GPUs.
        growth: What the batch of the configuration is multiplied by.
        lr: Learning rate of the configuration.
        faster: Clips per second against the batch that was to be planned.
    """

    time: StepTime
    batch: int | None
    batch_size: int
    growth: float
    lr: float
    faster: float

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate by either rule for larger batches."""
        return {"square root": self.lr * math.sqrt(self.growth), "linear": self.lr * self.growth}

    def __str__(self) -> str:
        times = (
            f"the GPU is not filled: its host takes {1e3 * self.time.host:.1f} ms a step, it "
            f"{1e3 * self.time.device:.1f} ms"
        )
        if self.batch is None:
            return f"{times}; no batch that fits fills it"
        root, linear = self.learning_rates.values()
        return (
            f"{times}; {self.batch} clips a device (train.batch_size={self.batch_size}) would give "
            f"{self.faster:.1f} times as many clips/s, with optim.lr={root:.1e} (by the square "
            f"root of the batch) to {linear:.1e} (in proportion to it)"
        )


def is_filled(config: Config, gpu: Gpu, batch: int, time: StepTime) -> bool:
    """Return whether a micro-batch fills a GPU; a device that launches no kernels always is."""
    tokens = batch * encoded_tokens(config)
    return not gpu.launch_us or (tokens >= TOKENS and time.host <= HOST_SHARE * time.device)


def advise(
    config: Config, gpu: Gpu, parameters: Parameters, world_size: int, choice: Choice
) -> Advice | None:
    """Return what to say of a choice; None where it fills the GPUs."""

    def step(batch: int) -> StepTime:
        return step_time(
            config, gpu, parameters, world_size=world_size, batch=batch, stage=choice.stage,
            every=choice.every,
        )  # fmt: skip

    now = step(choice.batch)
    if is_filled(config, gpu, choice.batch, now):
        return None
    most = largest_batch(
        config, gpu, parameters, world_size=world_size, stage=choice.stage, every=choice.every
    )
    parts, before = world_size * config.train.accumulation_steps, config.train.batch_size
    powers = (2**k for k in range(17) if choice.batch < 2**k <= most)
    for batch in powers:
        then = step(batch)
        if is_filled(config, gpu, batch, then):
            faster = batch / then.total / (choice.batch / now.total)
            size = batch * parts
            return Advice(now, batch, size, size / before, config.optim.lr, faster)
    return Advice(now, None, choice.batch * parts, 1.0, config.optim.lr, 1.0)
