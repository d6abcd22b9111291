"""What the forward pass keeps for the backward pass, in bytes.

    b clips, L tokens of width D, H heads, e bytes of an activation

    block              16 L D e + 4 H L + 16 L         Korthikanti et al. 2022, equation 2, without
                                                       dropout and with attention in tiles
    on a CPU           H L^2 e in place of 4 H L       probabilities, where they are few

With latent targets there are b C clones, of whose L tokens only E + V are encoded, and for each a
decoder over N patches: 3 N D e + 8 N a layer, inputs of convolution, norm and GELU.

They are exact for eager PyTorch; a compiled block keeps somewhat less.
"""

import torch

from ssast.engine.config import Config
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.settings import SIZES
from ssast.kernels.attention import Backend, attention_backend
from ssast.kernels.blocked_attention import keeps_probabilities
from ssast.kernels.matmul import fast_matmul


def element_bytes(gpu: Gpu) -> int:
    """Return the bytes of a weight, a gradient or an activation."""
    return 2 if gpu.precision == "bf16" else 4


def reduced_bytes(config: Config, gpu: Gpu) -> int:
    """Return the bytes of a gradient on its way between ranks."""
    return {"fp32": 4, "bf16": 2, "auto": element_bytes(gpu)}[config.train.reduce_dtype]


def cpu_attention(gpu: Gpu) -> Backend | None:
    """Return the backend that attention has on this machine's CPU in training; None of a GPU."""
    if not gpu.is_cpu:
        return None
    dtype = torch.bfloat16 if gpu.precision == "bf16" else torch.float32
    with fast_matmul():
        return attention_backend(torch.device("cpu"), dtype)


def attention_activations(
    cpu_attention: Backend | None, e: int, *, batch: int, heads: int, queries: int, keys: int
) -> float:
    """Return the bytes that attention keeps of each clip of a batch, besides q, k, v and result."""
    if cpu_attention in ("blocked", "blocked-or-sdpa"):
        if keeps_probabilities(batch, heads, queries, keys):
            return heads * queries * keys * e
        if cpu_attention == "blocked":
            return 0  # the probabilities are computed again
    return 4 * heads * queries  # logsumexp


def block_activations(
    config: Config, batch: int, e: int, cpu_attention: Backend | None = None
) -> list[float]:
    """Return the bytes that each block keeps for its backward pass.

    Args:
        config: Configuration of the run.
        batch: b, clips.
        e: Bytes of an activation.
        cpu_attention: Backend of attention on a CPU; None: on a GPU.
    """
    size = SIZES[config.model.size]
    D, H, depth = size.embed_dim, size.num_heads, config.model.depth or size.depth
    N = config.grid[0] * config.grid[1]
    L = config.num_tokens

    def kept(values: float, queries: int, rows: float) -> float:
        attended = attention_activations(
            cpu_attention, e, batch=batch, heads=H, queries=queries, keys=L
        )
        return values * D * e + attended + 8 * rows  # mean and rstd of norms

    # Inputs of both norms, of q k v and of the MLP, q k v, output of attention: 8 L D. Before and
    # after the GELU: 8 L D. The same of pre-norm and post-norm.
    blocks = [batch * kept(16 * L, L, 2 * L)] * depth
    if config.finetune is not None:
        return blocks
    M, own = config.objective.num_masked, L - config.objective.num_masked
    is_post_norm = config.model.norm == "post"
    last = kept(3 * L + 14 * M, M, 2 * M) if is_post_norm else kept(4 * L + 13 * M, M, L + M)
    blocks[-1] = batch * last
    if depth > 1 and M * batch > N:  # masked patches pass the first norm once for all clips
        first = kept(16 * L + own, L, 2 * L) if is_post_norm else kept(15 * L + 2 * own, L, L + own)
        blocks[0] = batch * first + kept(2 * N, 0, N)
    return blocks


def latent_activations(
    config: Config, batch: int, e: int, every: int | None, cpu_attention: Backend | None = None
) -> float:
    """Return the same as :func:`activations` with latent targets."""
    size, objective = SIZES[config.model.size], config.objective
    D, H, depth = size.embed_dim, size.num_heads, config.model.depth or size.depth
    N, M = config.grid[0] * config.grid[1], objective.num_masked
    L, rows = config.num_tokens, batch * objective.clones
    S = L - M
    attended = attention_activations(cpu_attention, e, batch=rows, heads=H, queries=S, keys=S)
    block = rows * (16.0 * S * D * e + attended + 16 * S)
    one = rows * S * D * e
    blocks = sum(one if every and i % every == 0 else block for i in range(depth))
    before = one + 8.0 * rows * S  # input of the norm before the first block
    layers = objective.decoder_depth * rows * N * (3.0 * D * e + 8)
    # Input and output of the last layer; predictions and targets of the loss, in float32.
    tail = rows * M * D * (2.0 * e + 8) + 4.0 * batch * N * D
    end = before + blocks + one + layers + tail
    # The gradients in the last layer of the decoder.
    decoding = before + blocks + layers + 3.0 * rows * N * D * e
    encoding = before + blocks + (block if every else 0.0) + 5.0 * one
    teaching = (depth + 16.0) * batch * L * D * e  # outputs of all blocks, and one block
    fbank = 4.0 * batch * config.audio.num_frames * config.audio.n_mels
    return fbank + max(end, decoding, encoding, teaching)


def activations(
    config: Config, batch: int, e: int, every: int | None, cpu_attention: Backend | None = None
) -> float:
    """Return the most bytes of activations, at the end of the forward pass or in the backward pass.

    Args:
        config: Configuration of the run.
        batch: b, clips of one device in one micro-step.
        e: Bytes of an activation.
        every: As ``train.activation_checkpoint_every``.
        cpu_attention: Backend of attention on a CPU; None: on a GPU.
    """
    size, objective = SIZES[config.model.size], config.objective
    if config.finetune is None and objective.kind == "latent":
        return latent_activations(config, batch, e, every, cpu_attention)
    D, L = size.embed_dim, config.num_tokens
    fbank = 4.0 * batch * config.audio.num_frames * config.audio.n_mels
    if config.finetune is not None and config.finetune.freeze == "encoder":
        return fbank + batch * e * L * D * 16  # one block's at a time, of which nothing is kept
    blocks = block_activations(config, batch, e, cpu_attention)
    kept = [batch * L * D * e if every and i % every == 0 else b for i, b in enumerate(blocks)]
    # Of the norm before the first block its input; of that after the last, also its output.
    is_post_norm = config.model.norm == "post"
    entry = batch * (L * D * e + 8.0 * L) if is_post_norm else 0.0
    before = [entry + sum(kept[:i]) for i in range(len(kept))]
    last = L if config.finetune is not None else objective.num_masked
    # A block in its backward pass has the gradient of its output, and of the MLP's hidden layer.
    gradients = [5.0 * batch * D * e * rows for rows in [*[L] * (len(blocks) - 1), last]]
    at_work = max(map(sum, zip(before, blocks, gradients, strict=True)))
    if config.finetune is not None:
        end = batch * (L * D * e if is_post_norm else 2.0 * L * D * e + 8 * L)
        return fbank + max(at_work, entry + sum(kept) + end)
    P, M = config.model.patch[0] * config.model.patch[1], objective.num_masked
    heads = 2 if objective.kind == "joint" else 1
    passes = 2 if objective.two_pass else 1
    # Input and output of the last norm; of each head its hidden layer, its predictions and the
    # loss's gradient; targets.
    states = M * D * e if is_post_norm else 2.0 * M * D * e + 8 * M
    tail = passes * (states + M * P * e) + heads * (M * D + 2 * M * P) * e
    whole = entry + sum(kept)
    return fbank + max(passes * whole + batch * tail, (passes - 1) * whole + at_work)
