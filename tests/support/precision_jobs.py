"""Trials of precisions on noise, for tests and for ranks."""

import noise_runs
import torch

from ssast.engine.planning.synthetic import SyntheticContext, noise, synthetic_task
from ssast.engine.train import precision
from ssast.engine.train.precision import choose_precision

AUTO = {"train__precision": "auto", "train__steps": 10**4}
NATIVE = {"avx512_bf16": True}


def build(world, finetune=False, **changed):
    config = noise_runs.configure(finetune, **AUTO | changed)
    torch.manual_seed(0)  # as a run does: of some weights, bf16 gradients are further off
    return synthetic_task(SyntheticContext(config, world, fbank=noise(config, 4)))


def choose(world, lacking):
    """The choice of one rank, of which another may have a CPU without bf16."""
    honest = torch.cpu.get_capabilities
    torch.cpu.get_capabilities = lambda: {} if world.rank == lacking else NATIVE
    before, precision._MARGIN = precision._MARGIN, 1e-6
    try:
        return tuple(choose_precision(build(world, train__batch_size=8), None))
    finally:
        torch.cpu.get_capabilities, precision._MARGIN = honest, before
