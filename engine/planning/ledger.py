"""The ledger of a training step: launches, bytes and FLOPs of each group of operations.

One step of the engine's own modules is taken on tensors without data, with the kernels that a GPU
would run (recorder.py). So what a change to a module or a kernel saves can be read off before there
is a GPU to measure it on. The least time of a group on a GPU is its roofline (Williams et al.
2009), operation by operation:

    time = sum of max(bytes / bandwidth, FLOPs / peak)
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssast.engine.config import Config
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.parallel.ranks import World
from ssast.engine.planning.recorder import META, Launch, Recorder, Recording
from ssast.engine.planning.synthetic import SyntheticContext, synthetic_task
from ssast.engine.train.step import train_step
from ssast.engine.train.task import Task

DATA, INPUTS, FORWARD, LOSS, BACKWARD, STEP = (
    "data", "inputs", "forward", "loss", "backward", "optimizer",
)  # fmt: skip
PHASES = (INPUTS, FORWARD, LOSS, BACKWARD, STEP)
"""Parts of a step; loading data is none, as that goes on beside it."""
# The part that begins at a mark of a step, see train_step.
MARKS = {"data": DATA, "inputs": INPUTS, "backward": BACKWARD, "optimizer": STEP, "other": DATA}
# Groups of operations of our own, by the beginning of their names, the longest first.
OURS = {
    "draw_masks": "masks, targets",
    "patch_embed": "embedding",
    "scatter_tokens": "gather, scatter",
    "info_nce": "losses",
    "mse": "losses",
}
# Groups of PyTorch's operations in a forward or backward pass.
GROUPS = {
    "mm": "matmul",
    "addmm": "matmul",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "_addmm_activation": "matmul",
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
    "matmul", "attention", "GELU, ReLU", "LayerNorm", "residual", "bias gradients", "cat, copies",
    "gather, scatter", "embedding", "masks, targets", "losses", "gradient copies", "gradient norm",
    "optimizer", "other",
)  # fmt: skip


def group_of(launch: Launch) -> str:
    """Return the group of an operation."""
    if launch.operation:
        own = max((n for n in OURS if launch.operation.startswith(n)), key=len, default="")
        return OURS.get(own, launch.operation)
    if launch.phase == INPUTS:
        return "masks, targets"
    if launch.phase == LOSS or any(n in launch.node for n in ("info_nce", "mse")):
        return "losses"
    if launch.phase == STEP:
        return "optimizer"
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
        kernels: Launches.
        read: Bytes.
        written: Bytes.
        flops: Of its matmuls.
        seconds: Least time on the GPU.
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
    """The operations of one training step on one GPU.

    Attributes:
        config: Configuration of the run.
        gpu: The GPU whose peaks give the times.
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


class _MetaEngine:
    """What a step needs of a :class:`TrainEngine`, on tensors without data."""

    def __init__(self, task: Task, recorder: Recorder):
        train = task.context.config.train
        self.world, self.accumulate = task.context.world, train.accumulation_steps
        self._module, self._recorder = task.module, recorder

    def __call__(self, *args: Any) -> Any:
        self._recorder.phase = FORWARD
        outputs = self._module(*args)
        self._recorder.phase = LOSS
        return outputs

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum_over_ranks(self, count: Tensor) -> "_Sum":
        return _Sum(count)

    def step(self, lr: float, grad_scale: float = 1.0) -> bool:
        return True


@dataclass(frozen=True)
class _Sum:
    total: Tensor

    def wait(self) -> Tensor:
        return self.total

    def read(self) -> int:
        return 1


def make_ledger(config: Config, gpu: Gpu, batch: int) -> Ledger:
    """Record one training step.

    Args:
        config: Configuration of the run, pretraining or fine-tuning.
        gpu: The GPU.
        batch: Clips of one micro-batch.
    """
    world = World(0, 0, 1, "single", META)
    clips = batch * config.train.accumulation_steps
    config = replace(config, train=replace(config.train, batch_size=clips))
    audio = config.audio
    fbank = torch.empty(batch, audio.num_frames, audio.n_mels, device=META)
    with torch.device(META):
        task = synthetic_task(SyntheticContext(config, world, fbank=fbank))
    dtype = torch.bfloat16 if gpu.precision == "bf16" else torch.float32
    task.module.to(META)
    for parameter in task.module.parameters():
        parameter.data = parameter.data.to(dtype)
    task.encoder.activation_checkpoint_every = config.train.activation_checkpoint_every
    recorder = Recorder()
    with recorder:
        recorder.hold("weights", list(task.module.parameters()))
        recorder.hold("batch", fbank)
        _record(task, recorder)
    return Ledger(config, gpu, batch, recorder.recording)


def _record(task: Task, recorder: Recorder) -> None:
    engine: Any = _MetaEngine(task, recorder)

    def mark(part: str) -> None:
        recorder.phase = MARKS[part]

    recorder.phase = INPUTS
    with task.train_batches(0) as batches:
        train_step(task, engine, batches, task.context.config.optim.lr, mark)
