"""Model FLOPs of a training step; a multiply-add counts as two.

    block, forward, L tokens of width D: 2 L 12 D^2 (linear layers) + 4 L^2 D (attention)
    backward = 2 x forward                               Kaplan et al. 2020, Chowdhery et al. 2022

These are model FLOPs: operations that an implementation avoids (the projection of masked patches,
say) count as well, so that MFU compares different implementations.
"""

from ssast.engine.config import Config
from ssast.engine.monitoring.gpus import find_gpu
from ssast.engine.settings import SIZES

PEAK_SHAPE = (4096, 768, 3072)
"""M, K and N of the matmul that a CPU's peak is measured with: the MLP of the base model, 19.3
GFLOP."""


def forward_flops(config: Config) -> float:
    """Return the FLOPs of one forward pass of the encoder over one clip."""
    size = SIZES[config.model.size]
    D, depth = size.embed_dim, config.model.depth or size.depth
    N = config.grid[0] * config.grid[1]
    P = config.model.patch[0] * config.model.patch[1]
    L = config.num_tokens
    return 2.0 * N * P * D + depth * 24.0 * L * D * D + attention_flops(config)


def attention_flops(config: Config) -> float:
    """Return the share of attention in these: scores and weighted sums of all blocks."""
    size = SIZES[config.model.size]
    L = config.num_tokens
    return (config.model.depth or size.depth) * 4.0 * L * L * size.embed_dim


def step_flops_per_clip(config: Config) -> float:
    """Return the FLOPs of a training step, forward and backward, per clip."""
    if config.finetune is not None:
        return (1 if config.finetune.freeze == "encoder" else 3) * forward_flops(config)
    D, P = SIZES[config.model.size].embed_dim, config.model.patch[0] * config.model.patch[1]
    head = 2.0 * config.objective.num_masked * (D * D + D * P)
    num_heads = 2 if config.objective.kind == "joint" else 1
    num_passes = 2 if config.objective.two_pass else 1
    return 3 * (num_passes * forward_flops(config) + num_heads * head)


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a known GPU; None if it is not in the table."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_tflops * 1e12
