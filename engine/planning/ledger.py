"""The ledger of a training step: launches, bytes and FLOPs of each group of operations.

One step of the engine's own modules and of DeepSpeed is taken on tensors without data, with the
kernels that a GPU would run, or the operations of a CPU (recorder.py). So what a change to a module
or a kernel saves can be read off before there is a GPU to measure it on. The least time of a group
is its roofline
(Williams et al. 2009), operation by operation:

    time = sum of max(bytes / bandwidth, FLOPs / peak)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.parallel.meta_accelerator import meta_accelerator
from ssast.engine.parallel.ranks import World, imagined_world
from ssast.engine.planning.activations import cpu_attention
from ssast.engine.planning.recorder import META, Launch, Recorder, Recording
from ssast.engine.planning.synthetic import SyntheticContext, synthetic_task
from ssast.engine.train.building import build_engine
from ssast.engine.train.step import train_step
from ssast.engine.train.task import Task
from ssast.kernels.attention import Backend

DATA, INPUTS, FORWARD, LOSS, BACKWARD, STEP = (
    "data", "inputs", "forward", "loss", "backward", "optimizer",
)  # fmt: skip
SCALARS = 4096  # elements at most of what is computed of norms
PHASES = (INPUTS, FORWARD, LOSS, BACKWARD, STEP)
"""Parts of a step; loading data is none, as that goes on beside it."""
# The part that begins at a mark of a step, see train_step.
MARKS = {"data": DATA, "inputs": INPUTS, "backward": BACKWARD, "optimizer": STEP, "other": DATA}
# Groups of operations of our own, by the beginning of their names, the longest first.
OURS = {
    "draw_masks": "masks, targets",
    "noise_rows": "masks, targets",
    "add_norm": "residual, LayerNorm",
    "gelu_backward": "GELU, ReLU",
    "join_chunks": "cat, copies",
    "patch_embed": "embedding",
    "scatter_tokens": "gather, scatter",
    "fill_masked": "gather, scatter",
    "info_nce": "losses",
    "mse": "losses",
    "efficient_attention": "attention",
    "blocked_attention": "attention",
}
# Groups of PyTorch's operations in a forward or backward pass.
GROUPS = {
    "mm": "matmul",
    "addmm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "_addmm_activation": "matmul",
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "gelu": "GELU, ReLU",
    "gelu_backward": "GELU, ReLU",
    "relu": "GELU, ReLU",
    "threshold_backward": "GELU, ReLU",
    "native_layer_norm": "LayerNorm",
    "native_layer_norm_backward": "LayerNorm",
    "cat": "cat, copies",
    "clone": "cat, copies",
    "copy_": "cat, copies",
    "_to_copy": "cat, copies",
    "gather": "gather, scatter",
    "scatter_add": "gather, scatter",
    "scatter_": "gather, scatter",
    "scatter_add_": "gather, scatter",
    "index": "gather, scatter",
    "slice_backward": "gather, scatter",
    "select_backward": "gather, scatter",
    "new_zeros": "gather, scatter",
    "arange": "gather, scatter",
    "add": "residual",
    "add_": "residual",
}
ORDER = (
    "matmul", "attention", "convolution", "GELU, ReLU", "LayerNorm", "residual",
    "residual, LayerNorm", "bias gradients", "cat, copies",
    "gather, scatter", "embedding", "masks, targets", "losses", "flat copies", "gradient norm",
    "optimizer", "other",
)  # fmt: skip


def group_of(launch: Launch) -> str:
    """Return the group of an operation."""
    if launch.operation.startswith("blocked_attention") and launch.name in ("clone", "copy_"):
        return "cat, copies"  # of queries, keys and values, head by head
    if launch.operation:
        own = max((n for n in OURS if launch.operation.startswith(n)), key=len, default="")
        return OURS.get(own, launch.operation)
    if launch.phase == INPUTS:
        return "masks, targets"
    if launch.phase == LOSS or any(n in launch.node for n in ("info_nce", "mse")):
        return "losses"
    if launch.phase == STEP:
        if launch.name.startswith(("_fused_adam", "_foreach_add", "_foreach_lerp")):
            return "optimizer"
        is_norm = launch.width <= SCALARS or "norm" in launch.name
        return "gradient norm" if is_norm else "flat copies"
    if launch.name in ("copy_", "div_") and launch.node in ("", "torch::autograd::AccumulateGrad"):
        return "flat copies"  # of gradients, by DeepSpeed
    if "attention" in launch.name:
        return "attention"
    if launch.name == "sum" and launch.phase == BACKWARD:
        return "bias gradients"
    return GROUPS.get(launch.name, "other")


@dataclass(frozen=True)
class Row:
    """A group of operations in the forward or in the backward pass, or both.

    Attributes:
        group: Its name.
        kernels: Launches; on a CPU operations.
        read: Bytes.
        written: Bytes.
        flops: Of its matmuls.
        seconds: Least time on the device.
    """

    group: str
    kernels: int = 0
    read: int = 0
    written: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def plus(self, other: "Row") -> "Row":
        """Return the sum of two rows under this one's name."""
        names = ("kernels", "read", "written", "flops", "seconds")
        return Row(self.group, **{n: getattr(self, n) + getattr(other, n) for n in names})


@dataclass(frozen=True)
class Ledger:
    """The operations of one training step on one device.

    Attributes:
        config: Configuration of the run.
        gpu: The device whose peaks give the times.
        batch: Clips of one micro-batch.
        recording: All operations, waits and the memory.
    """

    config: Config
    gpu: Gpu
    batch: int
    recording: Recording

    def rows(self, *phases: str) -> dict[str, Row]:
        """Return the groups of some phases, of all if none is named, in their order."""
        found: dict[str, Row] = {}
        for launch in self.recording.launches:
            if launch.phase not in (phases or PHASES):
                continue
            name = group_of(launch)
            found[name] = found.get(name, Row(name)).plus(self._row(launch))
        rank = {name: i for i, name in enumerate(ORDER)}
        return dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))

    def total(self, *phases: str) -> Row:
        """Return the sum of some phases, of all if none is named."""
        total = Row("all")
        for row in self.rows(*phases).values():
            total = total.plus(row)
        return total

    def _row(self, launch: Launch) -> Row:
        seconds = max(
            (launch.read + launch.written) / (self.gpu.bandwidth_gb_s * 1e9),
            launch.flops / (self.gpu.peak_tflops * 1e12),
        )
        return Row("", launch.kernels, launch.read, launch.written, launch.flops, seconds)


def make_ledger(config: Config, gpu: Gpu, batch: int, world_size: int = 1) -> Ledger:
    """Record one training step of one rank.

    The step before it is not recorded: in that, the optimizer's state is made.

    Args:
        config: Configuration of the run, pretraining or fine-tuning.
        gpu: The device; a CPU's attention is that of this machine.
        batch: Clips of one micro-batch.
        world_size: Devices.

    Raises:
        ConfigError: The step moves weights or states as it goes, which is not recorded.
        RuntimeError: This process takes part in a run.
    """
    train = config.train
    if train.zero_stage == 3 or train.offload != "none":
        raise ConfigError(
            f"--ledger: expected train.zero_stage 1 or 2 and train.offload none, found "
            f"{train.zero_stage} and {train.offload}"
        )
    clips = batch * train.accumulation_steps * world_size
    train = replace(train, batch_size=clips, compile=False, cuda_graphs=False)
    if gpu.is_cpu:
        train = replace(train, precision="bf16" if gpu.precision == "bf16" else "fp32")
    elif gpu.precision == "fp32":
        train = replace(train, precision="fp32")
    config = replace(config, train=train)
    audio, recorder = config.audio, Recorder(cpu_attention=cpu_attention(gpu))
    with (
        imagined_world(World(0, 0, world_size, "single", META)) as world,
        meta_accelerator(recorder.wait, cpu=gpu.is_cpu),
        recorder,
    ):
        fbank = torch.empty(batch, audio.num_frames, audio.n_mels, device=META)
        recorder.hold("batch", fbank)
        with torch.device(META):
            task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
        recorder.count = clips  # valid ones: all
        recorder.phase = STEP  # whose memory is made here
        engine = build_engine(task)
        # The shapes of flat weights, which DeepSpeed keeps as tensors of this very kind.
        recorder.forget(getattr(engine._zero, "round_robin_bit16_meta", []))
        try:
            with task.train_batches(0) as batches:
                train_step(task, engine, batches, config.optim.lr)
                recorder.hold("weights", list(task.module.parameters()))
                recorder.restart()
                train_step(task, engine, batches, config.optim.lr, _mark(task, recorder))
                recording = recorder.restart()
        finally:
            engine.close()
    return Ledger(config, gpu, batch, recording)


def record_passes(
    config: Config,
    batch: int,
    every: int | None,
    dtype: torch.dtype,
    cpu_attention: Backend | None = None,
) -> Recording:
    """Record the forward and the backward pass of one micro-batch alone, without DeepSpeed.

    Args:
        config: Configuration of the run.
        batch: Clips.
        every: As ``train.activation_checkpoint_every``.
        dtype: Of weights and activations.
        cpu_attention: Backend of attention on the CPU that does it; None: a GPU does.
    """
    config = replace(config, train=replace(config.train, batch_size=batch, accumulation_steps=1))
    audio, recorder = config.audio, Recorder(cpu_attention=cpu_attention)
    world = World(0, 0, 1, "single", META)
    with torch.device(META):
        fbank = torch.empty(batch, audio.num_frames, audio.n_mels)
        task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
    task.encoder.activation_checkpoint_every = every
    for module in (task.module, *([task.teacher] if task.teacher is not None else [])):
        for parameter in module.to(META).parameters():
            parameter.data = parameter.data.to(dtype)
    with recorder, task.train_batches(0) as batches:
        mark = _mark(task, recorder)
        mark("data")
        micro_batch = next(batches)
        mark("inputs")
        inputs, valid = task.inputs(micro_batch, training=True)
        loss = task.means(task.module(*inputs), valid)["loss"]
        mark("backward")
        loss.backward()
    return recorder.recording


def _mark(task: Task, recorder: Recorder) -> Callable[[str], None]:
    """Return what a step calls as its parts begin; the forward pass is the module's own."""

    def mark(part: str) -> None:
        recorder.phase = MARKS[part]

    def enter(*_: Any) -> None:
        recorder.phase = FORWARD

    def leave(*_: Any) -> None:
        recorder.phase = LOSS

    task.module.register_forward_pre_hook(enter)
    task.module.register_forward_hook(leave)
    return mark
