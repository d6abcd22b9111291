"""The training engine that a configuration asks for."""

from typing import Literal

import torch
from torch import nn

from ssast.engine.config import Config
from ssast.engine.model.encoder import SpectrogramTransformer
from ssast.engine.parallel.deepspeed_engine import TrainEngine
from ssast.engine.parallel.ranks import World


def precision_of(config: Config, device: torch.device) -> Literal["fp32", "bf16"]:
    """Of weights and activations on a device."""
    if config.train.precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return config.train.precision


def build_engine(
    config: Config,
    module: nn.Module,
    encoder: SpectrogramTransformer,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    batch_size: int,
) -> TrainEngine:
    """The engine of a module, its blocks recomputed and compiled as the configuration says.

    Args:
        config: Of the run.
        module: What is trained, on the world's device.
        encoder: Of the module.
        optimizer: Over its trainable parameters.
        world: This process's.
        batch_size: Clips of one rank in one micro-step.
    """
    train = config.train
    encoder.activation_checkpoint_every = train.activation_checkpoint_every
    engine = TrainEngine(
        module,
        optimizer,
        world=world,
        batch_size=batch_size,
        accumulate=train.accumulation_steps,
        zero_stage=train.zero_stage,
        precision=precision_of(config, world.device),
        max_grad_norm=config.optim.max_grad_norm,
        offload=train.offload,
        reduce_dtype=train.reduce_dtype,
    )
    if train.compile:
        for block in encoder.blocks:
            block.compile()
    return engine
