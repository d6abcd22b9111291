"""Model FLOPs of a training step; a multiply-add counts as two.

    block, forward, L tokens of width D: 2 L 12 D^2 (linear layers) + 4 L^2 D (attention)
    backward = 2 x forward                               Kaplan et al. 2020, Chowdhery et al. 2022

With latent targets a clip costs a forward and a backward pass of the student over E + V tokens and
of the decoder for each of its clones, and a forward pass of the teacher over all tokens.

These are model FLOPs: operations that an implementation avoids (the projection of masked patches,
say) count as well, so that MFU compares different implementations.
"""

from ssast.engine.config import Config
from ssast.engine.model.decoder import GROUPS
from ssast.engine.monitoring.gpus import find_gpu
from ssast.engine.settings import SIZES

PEAK_SHAPE = (4096, 768, 3072)
"""M, K and N of the matmul that a CPU's peak is measured with: the MLP of the base model, 19.3
GFLOP."""


def forward_flops(config: Config) -> float:
    """Return the FLOPs of one forward pass of the encoder over one clip."""
    return embedding_flops(config) + blocks_flops(config, config.num_tokens)


def embedding_flops(config: Config) -> float:
    """Return the FLOPs of the embedding of all patches of a clip."""
    D, P = SIZES[config.model.size].embed_dim, config.model.patch[0] * config.model.patch[1]
    return 2.0 * config.grid[0] * config.grid[1] * P * D


def blocks_flops(config: Config, num_tokens: int) -> float:
    """Return the FLOPs of a forward pass of all blocks over so many tokens."""
    size = SIZES[config.model.size]
    D, depth = size.embed_dim, config.model.depth or size.depth
    return depth * (24.0 * num_tokens * D * D + 4.0 * num_tokens**2 * D)


def decoder_flops(config: Config) -> float:
    """Return the FLOPs of a forward pass of the decoder of latent targets over one clone."""
    D, N = SIZES[config.model.size].embed_dim, config.grid[0] * config.grid[1]
    convolution = 2.0 * N * D * 9 * D / GROUPS
    return config.objective.decoder_depth * convolution + 2.0 * config.objective.num_masked * D * D


def encoded_tokens(config: Config) -> int:
    """Return the tokens of a clip that pass the trained blocks, of all of its clones together."""
    if config.finetune is None and config.objective.kind == "latent":
        return config.objective.clones * (config.num_tokens - config.objective.num_masked)
    return config.num_tokens


def step_flops_per_clip(config: Config) -> float:
    """Return the FLOPs of a training step, forward and backward, per clip."""
    if config.finetune is not None:
        return (1 if config.finetune.freeze == "encoder" else 3) * forward_flops(config)
    if config.objective.kind == "latent":
        C = config.objective.clones
        clone = blocks_flops(config, encoded_tokens(config) // C) + decoder_flops(config)
        return 3 * (embedding_flops(config) + C * clone) + forward_flops(config)
    D, P = SIZES[config.model.size].embed_dim, config.model.patch[0] * config.model.patch[1]
    head = 2.0 * config.objective.num_masked * (D * D + D * P)
    num_heads = 2 if config.objective.kind == "joint" else 1
    num_passes = 2 if config.objective.two_pass else 1
    return 3 * (num_passes * forward_flops(config) + num_heads * head)


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a known GPU; None if it is not in the table."""
    gpu = find_gpu(device_name)
    return None if gpu is None else gpu.peak_tflops * 1e12
