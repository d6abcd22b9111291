"""What a run needs and how long it takes: memory, time and traffic by formula.

    P parameters, W devices, e bytes of a weight or an activation, 12 = fp32 master weight and two
    moments

    weights            e P; ZeRO 3: e P / W + live     Rajbhandari et al. 2020, DeepSpeed 0.19
    teacher            e times the encoder's weights
    optimizer          12 P / W; with an average (train.ema, a teacher) 16 P / W
    gradients          e P; ZeRO 2, 3: e P / W         + 4 P / W, the flat copy of the step;
                                                       accumulating: + 4 P, ZeRO 2, 3: 4 P / W
    FLOPs, bytes       of a step's operations: the ledger of a few layers, work.py
    time               matmul / (their share of the peak) + attention, convolution / (theirs)
                       + bytes of norms, activations, residuals / (share of the bandwidth)
    collectives        volume (W - 1) / W / bus bandwidth + latency       nccl-tests, PERFORMANCE.md
    on the wire        ZeRO 1: 2 P reduced + P gathered, ZeRO 2: P reduced + P gathered,
                       ZeRO 3: P reduced + 2 P gathered, in elements; a teacher: + P gathered

Activations: see activations.py.
"""

import math
from dataclasses import dataclass

import torch

from ssast.engine.checkpoints.classifier import build_classifier
from ssast.engine.config import Config
from ssast.engine.model.objective import PretrainingModel, build_objective
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.parallel.deepspeed_engine import deepspeed_config
from ssast.engine.planning.activations import (
    activations,
    cpu_attention,
    element_bytes,
    reduced_bytes,
)
from ssast.engine.planning.work import work
from ssast.engine.settings import SIZES

GIB = 2**30
# Of a compiled block, at a guess: elements that pass through memory besides matmuls and attention,
# per token and unit of width, and operations.
COMPILED_TRAFFIC, COMPILED_LAUNCHES = 40.0, 40
ENGINE_S = {1: 0.007, 2: 0.007, 3: 0.050}  # DeepSpeed's own host time of a step, besides launches
GRAPHS = 3  # launches where masks, forward and backward pass are CUDA graphs
STEP_LAUNCHES = 57  # of the norm and the optimizer, and of the mean over valid clips
GROUP_LAUNCHES = 16  # of another group of parameters, and of clipping the gradient of a group
COPIES = 2  # of each parameter's gradient, to DeepSpeed's bucket and to its partition
HOP_S = 6e-6  # of a ring, from machine to machine
LIVE_ELEMENTS = 200_000_000  # that ZeRO 3 keeps gathered, at most: live and prefetched
# Read and written for a parameter. Of a micro-batch: DeepSpeed's copies of the gradient, in bf16,
# and its division by the number of ranks. Of a step, on the rank that has it: norm, flat gradient
# in fp32, Adam, weight; 3 e more, as gradient and weight have e bytes.
COPIED_BYTES, STEP_BYTES = 16, 36
CLIP_BYTES = 8  # likewise, of clipping: the gradient read and written
EMA_BYTES = 12  # likewise, of the average: itself and the weight read, itself written
MOST_CLIPS = 65536  # of a step: what You et al. 2020 still trained with, and more than most dare
HIDDEN = 0.9  # share of the backward pass behind which reductions disappear


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in a step."""

    weights: float
    accumulated: float
    """Gradients that are kept from one micro-batch to the next."""

    gradients: float
    """Of the step, with the flat copy in fp32 that it is taken from."""

    optimizer: float
    buckets: float
    activations: float
    base: float

    @property
    def total(self) -> float:
        """The most at a time: activations make room for gradients as the backward pass goes on."""
        kept = self.weights + self.accumulated + self.optimizer + self.buckets + self.base
        return kept + max(self.activations, self.gradients)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    matmul: float
    attention: float
    convolution: float
    elementwise: float
    optimizer: float
    reduce: float
    gather: float
    exposed: float
    """Time of collectives that is not hidden behind the backward pass."""
    host: float
    """Time of launching operations, which goes on beside the device's work."""

    @property
    def device(self) -> float:
        """Time of computing, without waiting for other devices."""
        computing = self.matmul + self.attention + self.convolution + self.elementwise
        return computing + self.optimizer

    @property
    def total(self) -> float:
        """Time from step to step."""
        return max(self.device, self.host) + self.exposed


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: all, those that are trained, the tensors of those, and a teacher's."""

    total: int
    trained: int
    tensors: int = 0
    teacher: int = 0


def count_parameters(config: Config) -> Parameters:
    """Count the configured model's parameters, without allocating them."""
    from ssast.engine.planning.synthetic import NUM_CLASSES

    with torch.device("meta"):
        model = (
            build_classifier(config, NUM_CLASSES) if config.finetune else build_objective(config)
        )
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = [n for n, is_trained in counts if is_trained]
    has_teacher = isinstance(model, PretrainingModel) and model.has_teacher
    teacher = sum(p.numel() for p in model.encoder.parameters()) if has_teacher else 0
    return Parameters(sum(n for n, _ in counts), sum(trained), len(trained), teacher)


def memory(
    config: Config,
    gpu: Gpu,
    parameters: Parameters,
    *,
    world_size: int,
    batch: int,
    stage: int,
    every: int | None = None,
) -> Memory:
    """Return the memory of one device.

    Args:
        config: Configuration of the run.
        gpu: The device.
        parameters: Of the model.
        world_size: W, devices.
        batch: b, clips of one device in one micro-step.
        stage: ZeRO 1, 2 or 3.
        every: As ``train.activation_checkpoint_every``.
    """
    P, T, W, e = parameters.total, parameters.trained, world_size, element_bytes(gpu)
    zero = deepspeed_config(
        world_size=W,
        batch_size=batch,
        accumulate=config.train.accumulation_steps,
        zero_stage=stage,
        precision=gpu.precision,
        max_grad_norm=None,
        num_params=P,
        cuda=True,
    )["zero_optimization"]
    bucket = (2 if zero["overlap_comm"] else 1) * e * min(zero["reduce_bucket_size"], T)
    weights = e * P / W + e * min(P, LIVE_ELEMENTS) * (W > 1) if stage == 3 else e * P
    weights += e * parameters.teacher
    gradients = e * T / W if stage > 1 else e * T
    flat = 4 * T / W if e == 2 else 0
    accumulates = config.train.accumulation_steps > 1
    offloaded = config.train.offload == "cpu"
    return Memory(
        weights=weights,
        accumulated=accumulates * 4 * (T / W if stage > 1 else T),
        gradients=gradients + flat,
        optimizer=0 if offloaded else optimizer_bytes(config, parameters) * T / W,
        buckets=bucket,
        activations=gpu.fragmentation * activations(config, batch, e, every, cpu_attention(gpu)),
        base=gpu.base_gib * GIB,
    )


def keeps_average(config: Config, parameters: Parameters) -> bool:
    """Return whether an average of the weights is kept."""
    return config.train.ema is not None or parameters.teacher > 0


def optimizer_bytes(config: Config, parameters: Parameters) -> int:
    """Return the bytes per trained weight of master weight, two moments and average, if kept."""
    return 16 if keeps_average(config, parameters) else 12


def largest_batch(
    config: Config,
    gpu: Gpu,
    parameters: Parameters,
    *,
    world_size: int,
    stage: int,
    every: int | None = None,
    most: int = 1 << 16,
) -> int:
    """Return the most clips of one device in one micro-batch that fit; 0 if not even one does."""

    def fits(batch: int) -> bool:
        need = memory(
            config, gpu, parameters, world_size=world_size, batch=batch, stage=stage, every=every
        )
        return need.total <= gpu.memory_gib * GIB

    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bus_bandwidth(gpu: Gpu, world_size: int) -> float:
    """Return bytes per second and device of a collective: the slower of link and network.

    Between machines each device's share of the ring crosses its node's adapters together with the
    others', so all of them count.
    """
    if world_size <= gpu.per_node:
        return gpu.link_gb_s * 1e9
    return min(gpu.link_gb_s, 0.85 * gpu.network_gb_s * gpu.per_node) * 1e9


def collective_s(gpu: Gpu, world_size: int, size: float, pieces: int) -> float:
    """Estimate the seconds to reduce or gather ``size`` bytes in pieces, in rings."""
    if world_size == 1:
        return 0.0
    nodes = math.ceil(world_size / gpu.per_node)
    latency = pieces * (2e-5 + HOP_S * (nodes - 1))
    return latency + size * (world_size - 1) / world_size / bus_bandwidth(gpu, world_size)


def wire_elements(parameters: Parameters, stage: int, micro_steps: int) -> tuple[float, float]:
    """Return the elements of a step that are reduced and that are gathered."""
    T, P = parameters.trained, parameters.total
    reduced = 2.0 * T if stage == 1 else float(T) * micro_steps
    return reduced, 2.0 * P * micro_steps if stage == 3 else float(T)


def uses_graphs(config: Config, stage: int) -> bool:
    """Return whether a run launches CUDA graphs, which need no host during the pass."""
    # Stage 3 gathers weights; with a padding mask the host reads how many patches are valid.
    needs_host = stage == 3 or config.audio.ignore_padding
    return config.train.cuda_graphs is not False and not needs_host


def step_time(
    config: Config,
    gpu: Gpu,
    parameters: Parameters,
    *,
    world_size: int,
    batch: int,
    stage: int,
    every: int | None = None,
) -> StepTime:
    """Return the time of one optimizer step; arguments as in :func:`memory`."""
    size, micro_steps = SIZES[config.model.size], config.train.accumulation_steps
    D, depth = size.embed_dim, config.model.depth or size.depth
    e = element_bytes(gpu)
    dtype = torch.bfloat16 if e == 2 else torch.float32
    passes = work(config, batch, every, dtype, cpu_attention(gpu))
    launches, moved = passes.launches, micro_steps * passes.moved
    # With latent targets most of it is the decoder's, which is not compiled.
    if config.train.compile is True and not parameters.teacher:
        tokens = batch * config.num_tokens
        moved = min(moved, micro_steps * tokens * D * depth * e * COMPILED_TRAFFIC)
        launches = min(launches, depth * COMPILED_LAUNCHES)
    if uses_graphs(config, stage):
        launches = GRAPHS
    copied = world_size > 1 or (micro_steps > 1 and e == 2)  # see zero_overrides.py
    launches += COPIES * parameters.tensors * copied
    peak = gpu.peak_tflops * 1e12
    matmul_s = micro_steps * passes.matmul / peak / (gpu.gemm_share * D / (D + gpu.half_width))
    attention_s = micro_steps * passes.attention / peak / gpu.attention_share
    convolution_s = micro_steps * passes.convolution / peak / gpu.convolution_share
    bandwidth = gpu.bandwidth_gb_s * gpu.bandwidth_share * 1e9
    step_bytes = micro_steps * COPIED_BYTES * copied + (STEP_BYTES + 3 * e) / world_size
    averages = keeps_average(config, parameters)
    ema_bytes = EMA_BYTES if averages else 0
    offloaded = config.train.offload == "cpu"
    step_bytes += 0 if offloaded else ema_bytes / world_size
    clips = config.optim.max_grad_norm is not None
    step_bytes += 0 if offloaded else clips * CLIP_BYTES / world_size
    optimizer_s = step_bytes * parameters.trained / bandwidth
    optimizer_s += teacher_bytes(parameters, world_size, e) / bandwidth
    if offloaded:  # over PCIe, and on the host
        optimizer_s += (16 + ema_bytes) * parameters.trained / world_size / 20e9
    reduced, gathered = wire_elements(parameters, stage, micro_steps)
    wire = reduced_bytes(config, gpu) * reduced
    reducing = 1 if stage == 1 else micro_steps  # stage 1 reduces in the last micro-step alone
    reduce_s = collective_s(gpu, world_size, wire, 5 * reducing)
    gather_pieces = depth * 2 * micro_steps if stage == 3 else max(1, math.ceil(gathered / 2e8))
    gather_s = collective_s(gpu, world_size, e * gathered, gather_pieces)
    if parameters.teacher:
        gather_s += collective_s(gpu, world_size, e * parameters.trained, 1)
    computing_s = matmul_s + attention_s + convolution_s + moved / bandwidth
    backward_s = HIDDEN * computing_s * 2 / 3
    if stage == 3:  # all of it beside computing
        exposed = max(0.0, reduce_s + gather_s - 1.5 * backward_s) if world_size > 1 else 0.0
    else:
        hiding_s = backward_s * reducing / micro_steps
        exposed = max(reduce_s - hiding_s, reduce_s / 5) + gather_s
    groups = 1 + (config.optim.name == "adamw")  # what is decayed, and what is not
    launches = micro_steps * launches + STEP_LAUNCHES + GROUP_LAUNCHES * (groups - 1)
    launches += GROUP_LAUNCHES * groups * clips + averages + 2 * (parameters.teacher > 0)
    host_s = launches * gpu.launch_us * 1e-6 + ENGINE_S[stage]
    return StepTime(
        matmul=matmul_s,
        attention=attention_s,
        convolution=convolution_s,
        elementwise=moved / bandwidth,
        optimizer=optimizer_s,
        reduce=reduce_s,
        gather=gather_s,
        exposed=exposed,
        host=host_s if gpu.launch_us else 0.0,
    )


def teacher_bytes(parameters: Parameters, world_size: int, e: int) -> float:
    """Return the bytes read and written to copy the average into a teacher after a step.

    Several ranks put their shares in its precision first, and copy from what they gathered.
    """
    if world_size == 1 or not parameters.teacher:
        return (4.0 + e) * parameters.teacher
    return (4.0 + e) * parameters.trained / world_size + 2.0 * e * parameters.teacher


@dataclass(frozen=True)
class Choice:
    """A way to run: what is sharded and recomputed, and the batch of a device."""

    stage: int
    every: int | None
    batch: int
    """Clips of one device in one micro-step."""


def choose(
    config: Config, gpu: Gpu, parameters: Parameters, world_size: int, batch: int | None = None
) -> tuple[Choice, list[str]] | None:
    """Return the recommended choice, and why; None if nothing fits.

    The lowest stage that holds at least the wanted batch is best: what is sharded must be fetched.
    Blocks are computed again only where nothing else helps, as that costs up to a third more
    FLOPs. The batch is the smallest power of two with 95 % of the best rate: larger ones are hardly
    faster, but train otherwise.

    Args:
        config: Configuration of the run.
        gpu: Each device.
        parameters: Of the model.
        world_size: Devices.
        batch: Clips of one device that must fit; any number from 8 on if None.
    """
    for every in (None, 2, 1):
        for stage in (1, 2, 3):
            most = largest_batch(
                config, gpu, parameters, world_size=world_size, stage=stage, every=every
            )
            if most < (batch or 8) and not (every == 1 and stage == 3 and most and batch is None):
                continue
            reasons = [_why_stage(stage), _why_every(every)]
            if batch is None:
                batch, reason = _knee(config, gpu, parameters, world_size, stage, every, most)
                reasons.append(reason)
            return Choice(stage, every, batch), reasons
    return None


def _knee(
    config: Config,
    gpu: Gpu,
    parameters: Parameters,
    world_size: int,
    stage: int,
    every: int | None,
    most: int,
) -> tuple[int, str]:
    limit = max(1, MOST_CLIPS // (world_size * config.train.accumulation_steps))
    powers = [2**k for k in range(11) if 2**k <= min(most, limit)]

    def rate(batch: int) -> float:
        time = step_time(
            config, gpu, parameters, world_size=world_size, batch=batch, stage=stage, every=every
        )
        return batch / time.total

    best = max(map(rate, powers))
    chosen = next(b for b in powers if rate(b) >= 0.95 * best)
    return chosen, (
        f"{chosen} clips a device: the smallest power of two with 95 % of the best rate; {most} fit"
    )


def _why_stage(stage: int) -> str:
    return {
        1: "ZeRO stage 1: everything else fits on each device, so only the optimizer is sharded",
        2: "ZeRO stage 2: with stage 1 the gradients would not fit as well",
        3: "ZeRO stage 3: with stage 2 the weights would not fit as well",
    }[stage]


def _why_every(every: int | None) -> str:
    if every is None:
        return "no activation checkpointing: the activations fit, and it would cost time"
    return (
        f"train.activation_checkpoint_every={every}: the activations of fewer blocks would not fit"
    )
