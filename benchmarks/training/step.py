"""A training step against the published one, on this machine's GPU or CPU.

Both train the same weights on the same filterbanks; masks, forward, backward and Adam are inside
the step. In pretraining it is that of SSAST's joint objective or of EAT's latent targets, whose
teacher is averaged inside the step; in fine-tuning patches are 10 mel bins and 10 frames apart,
there are 527 classes, and augmentations are left out on both sides. Each side runs in a process of
its own, as in practice, and they take turns, so that whatever else runs on the machine disturbs
both alike. The ratio is the median over the turns. On a GPU a turn is several steps between CUDA
events, both sides compute in bf16 (the published one by autocast), and ours is run as
``ssast pretrain`` does: with DeepSpeed, compiled or as CUDA graphs where trials choose that.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssast.benchmarks.device import CPU, add_device_option, find_device, timed, use_device
from ssast.benchmarks.training.baseline import (
    Baseline,
    ClassifierBaseline,
    published_optimizer,
    train_step,
)
from ssast.benchmarks.training.groups import (
    GroupTime,
    beside_ledger,
    format_groups,
    measured_groups,
)
from ssast.benchmarks.training.latent_baseline import LatentBaseline, latent_step, own_masks
from ssast.benchmarks.training.ours import OurStep
from ssast.benchmarks.training.setting import Setting
from ssast.engine.errors import ConfigError
from ssast.engine.model.classifier import LossClassifier
from ssast.engine.model.latent import Latent
from ssast.engine.model.objective import MSPM
from ssast.engine.monitoring.flops import PEAK_SHAPE, step_flops_per_clip
from ssast.engine.monitoring.gpus import GPUS, Gpu, find_gpu
from ssast.engine.monitoring.monitor import peak_memory_gib
from ssast.engine.settings import SIZES
from ssast.kernels.matmul import fast_matmul
from ssast.kernels.memory import keep_freed_memory

GPU_STEPS = 10  # of a turn: one takes milliseconds
STEPS_OF_A_RUN = 100_000  # compiling is for long runs
_PROFILED_STEPS = 3


@dataclass(frozen=True)
class Quartiles:
    """Median and the two quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Compute them from a few measurements."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True)
class Result:
    """What was measured; seconds are those of one step.

    On a GPU, CPU seconds are those of the host, and the peak is per second of the GPU.
    """

    setting: Setting
    baseline_cpu_s: Quartiles
    baseline_wall_s: Quartiles
    ours_cpu_s: Quartiles
    ours_wall_s: Quartiles
    cpu_ratio: Quartiles
    wall_ratio: Quartiles
    gflop: float  # of our step, counted as if nothing were left out
    gflops_per_cpu_s: float  # of ours
    peak_gflops_per_cpu_s: float  # of a large fp32 matrix product on as many threads
    loss_difference: float  # relative, on the same masks
    baseline_memory_gib: float
    ours_memory_gib: float
    mfu: dict[str, float]  # of both sides, on a known GPU
    execution: list[str]  # what trials on a GPU have found
    groups: list[GroupTime]  # of our step, eager


def _published_step(setting: Setting) -> Callable[[], object]:
    full, device = replace(setting, precision="fp32"), torch.device(setting.device)
    config, fbank = full.config(), full.fbank().to(device)
    module = OurStep(config, fbank, device=device).task.module
    # The published data loader normalises before the step.
    x = (fbank - config.audio.mean) / (2 * config.audio.std)
    bf16 = setting.precision == "bf16"
    if isinstance(module, Latent):
        latent = LatentBaseline(config, module).to(device)
        return partial(latent_step, latent, latent.optimizer(config.optim), x, bf16=bf16)
    model: Baseline | ClassifierBaseline
    batch: tuple[torch.Tensor, ...] = (x,)
    if isinstance(module, MSPM):
        model = Baseline(config, module).to(device)
    else:
        assert isinstance(module, LossClassifier)
        model = ClassifierBaseline(config, module).to(device)
        batch = x, setting.targets().to(device)
    optimizer = published_optimizer(model)
    return partial(train_step, model, optimizer, *batch, bf16=bf16)


def _our_step(setting: Setting) -> tuple[Callable[[], object], list[str]]:
    """Return our step, and what trials of its execution have found."""
    step = OurStep(
        setting.config(),
        setting.fbank(),
        deepspeed=setting.with_engine,
        device=torch.device(setting.device),
    )
    torch.set_num_threads(setting.threads)  # DeepSpeed sets them as well
    return step.take, step.start_execution(STEPS_OF_A_RUN).lines()


def _groups(setting: Setting) -> dict[str, tuple[float, float]]:
    """Profile our eager step in this process."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler logs every start and stop
    device = torch.device(setting.device)
    use_device(device)
    torch.set_num_threads(setting.threads)
    config = setting.config()
    eager = replace(config, train=replace(config.train, compile=False, cuda_graphs=False))
    with fast_matmul():
        step = OurStep(eager, setting.fbank(), deepspeed=setting.with_engine, device=device)
        return measured_groups(step, _PROFILED_STEPS)


def _work(connection: Connection, name: str, setting: Setting) -> None:
    """Answer every message with the time of a step or of a large matmul."""
    device = torch.device(setting.device)
    use_device(device)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    random.seed(0)
    if name == "ours" and not setting.default_memory and not setting.on_gpu:
        keep_freed_memory()
    lines: list[str] = []
    with fast_matmul() if name == "ours" else nullcontext():  # as ssast pretrain does
        if name == "baseline":
            step = _published_step(setting)
        else:
            step, lines = _our_step(setting)
        dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
        tasks: dict[str, Callable[[], object]] = {
            "step": lambda: timed(step, device, GPU_STEPS if setting.on_gpu else 1),
            "peak": lambda: peak_gflops(product_s(dtype, device=device)[setting.on_gpu]),
            "memory": lambda: peak_memory_gib(device),
            "execution": lambda: lines,
        }
        for task in iter(connection.recv, None):
            connection.send(tasks[task]())


def product_s(
    dtype: torch.dtype = torch.float32, turns: int = 3, device: torch.device = CPU
) -> tuple[float, float]:
    """Return the least CPU and wall-clock seconds of a matmul of :data:`PEAK_SHAPE`."""
    M, K, N = PEAK_SHAPE
    left = torch.randn(M, K).to(device, dtype)
    right = torch.randn(K, N).to(device, dtype)
    out = torch.empty(M, N, dtype=dtype, device=device)
    times = [timed(lambda: torch.mm(left, right, out=out), device) for _ in range(turns + 1)][1:]
    return min(cpu_s for cpu_s, _ in times), min(wall_s for _, wall_s in times)


def peak_gflops(seconds: float) -> float:
    """Return GFLOP/s, where a matmul of :data:`PEAK_SHAPE` takes so long."""
    return 2e-9 * math.prod(PEAK_SHAPE) / seconds


def measure(setting: Setting, repeats: int, *, groups: bool = False) -> Result:
    """Time both sides in turns.

    Args:
        setting: What to compute.
        repeats: Turns that count, at least 2; one before them does not.
        groups: Whether to profile our step by the groups of the ledger.
    """
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in ("baseline", "ours"):
        pipes[name], theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, name, setting), daemon=True)
        worker.start()
        theirs.close()  # so that the end of the worker is noticed
        workers.append(worker)

    def run(name: str, task: str) -> Any:
        try:
            pipes[name].send(task)
            return pipes[name].recv()
        except (EOFError, BrokenPipeError):
            raise ConfigError(f"the process of the step {name!r} ended without a result") from None

    turns, peaks = [], []
    for turn in range(repeats + 1):
        times = run("baseline", "step"), run("ours", "step")
        peaks.append(run("ours", "peak"))
        if turn >= 1:
            turns.append(times)
    memory = [run(name, "memory") for name in pipes]
    execution = run("ours", "execution")
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(None)
        worker.join()
    baseline, ours = zip(*turns, strict=True)
    gflop = step_flops_per_clip(setting.config()) * setting.batch / 1e9
    gpu = find_gpu(torch.cuda.get_device_name(setting.device)) if setting.on_gpu else None
    profiled: list[GroupTime] = []
    if groups:
        config = setting.config()
        config = replace(config, train=replace(config.train, batch_size=setting.batch))
        with context.Pool(1) as pool:
            spent = pool.apply(_groups, (setting,))
        profiled = beside_ledger(spent, config, gpu or GPUS[0], measured=gpu is not None)
    return Result(
        setting,
        Quartiles.of([cpu for cpu, _ in baseline]),
        Quartiles.of([wall for _, wall in baseline]),
        Quartiles.of([cpu for cpu, _ in ours]),
        Quartiles.of([wall for _, wall in ours]),
        Quartiles.of([b[0] / o[0] for b, o in turns]),
        Quartiles.of([b[1] / o[1] for b, o in turns]),
        gflop,
        gflop / statistics.median(step[setting.on_gpu] for step in ours),
        max(peaks),
        loss_difference(setting),
        memory[0],
        memory[1],
        _mfu(setting, gpu, baseline, ours),
        execution,
        profiled,
    )


def _mfu(
    setting: Setting, gpu: Gpu | None, *sides: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Return the model FLOPs utilisation of both sides by the GPU's data sheet; {} of others.

    The published pretraining with the joint objective has two forward passes, which count.
    """
    if gpu is None:
        return {}
    found = {}
    for name, times in zip(("baseline", "ours"), sides, strict=True):
        config = setting.config(two_pass=name == "baseline")
        flops = step_flops_per_clip(config) * setting.batch
        found[name] = flops / statistics.median(s for _, s in times) / (gpu.peak_tflops * 1e12)
    return found


@torch.no_grad()
def loss_difference(setting: Setting) -> float:
    """Return the relative difference of the losses of the same weights and masks, in fp32."""
    torch.manual_seed(0)
    setting = replace(setting, batch=min(setting.batch, 2), device="cpu", precision="fp32")
    config, fbank = setting.config(two_pass=True), setting.fbank()
    step = OurStep(config, fbank)
    task, x = step.task, step.task.encoder.embed.normalise(fbank)
    inputs, valid = task.inputs(next(step.batches), training=True)
    ours = task.means(task.module(*inputs), valid)["loss"].item()
    if isinstance(task.module, Latent):
        losses = LatentBaseline(config, task.module).losses(x, *own_masks(task.module, *inputs[1:]))
    elif isinstance(task.module, MSPM):
        losses = Baseline(config, task.module).losses(x, *(m.mask_ids for m in inputs[1:]))
    else:
        assert isinstance(task.module, LossClassifier)
        losses = ClassifierBaseline(config, task.module).losses(x, setting.targets())
    theirs = losses["loss"].item()
    return abs(ours - theirs) / abs(theirs)


def _row(*cells: str) -> str:
    return f"  {cells[0]:16}{cells[1]:24}{cells[2]}"


def _table(result: Result) -> str:
    s, peak = result.setting, result.peak_gflops_per_cpu_s
    d = ".4f" if s.on_gpu else ".2f"
    rows = [
        f"{'fine-tuning' if s.finetune else f'pretraining ({s.objective})'} {s.size}, "
        f"{s.frames} frames, "
        f"batch {s.batch}, {s.threads} threads"
        + (f", {s.device}, {s.precision}" if s.on_gpu else "")
        + "; median (quartiles) of one step",
        _row("", "CPU s", "GPU s" if s.on_gpu else "wall s"),
        _row("published step", f"{result.baseline_cpu_s:{d}}", f"{result.baseline_wall_s:{d}}"),
        _row("this project", f"{result.ours_cpu_s:{d}}", f"{result.ours_wall_s:{d}}"),
        _row("times faster", f"{result.cpu_ratio:.2f}", f"{result.wall_ratio:.2f}"),
        f"  {result.gflop:.0f} GFLOP a step: {result.gflops_per_cpu_s:.0f} GFLOP per "
        f"{'' if s.on_gpu else 'CPU '}second, "
        f"{result.gflops_per_cpu_s / peak:.0%} of a large matrix product's {peak:.0f}",
        f"  loss of the same weights: relative difference {result.loss_difference:.1e}",
    ]
    if s.on_gpu:
        clips = {"published": result.baseline_wall_s, "this project": result.ours_wall_s}
        memory = result.baseline_memory_gib, result.ours_memory_gib
        for (side, seconds), gib in zip(clips.items(), memory, strict=True):
            rows.append(
                f"  {side}: {s.batch / seconds.median:.1f} clips/s, {gib:.2f} GiB at the peak"
            )
        rows += [f"  MFU {side}: {mfu:.1%}" for side, mfu in result.mfu.items()]
        rows += [f"  {line}" for line in result.execution]
    if result.groups:
        rows += ["  our eager step by groups of operations:", format_groups(result.groups)]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table, or a JSON list.

    Args:
        argv: Command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit status, 0.
    """
    parser = argparse.ArgumentParser(prog="ssast bench step", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base"], choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8, help="clips of a step (default 8)")
    parser.add_argument("--frames", type=int, default=1024, help="frames of a clip (default 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument(
        "--default-memory", action="store_true", help="do not tune the allocator for our step"
    )
    parser.add_argument(
        "--finetune", action="store_true", help="a step of fine-tuning instead of pretraining"
    )
    parser.add_argument(
        "--objective",
        choices=["joint", "latent"],
        default="joint",
        help="of pretraining: SSAST's or EAT's (default joint)",
    )
    add_device_option(parser)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="(default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--groups",
        action="store_true",
        help="time of groups of operations as well, beside the ledger's",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    args = parser.parse_args(argv)
    if args.repeats < 2 or args.frames < 32:
        parser.error("needs at least 2 repeats and 32 frames")
    if args.finetune and args.objective != "joint":
        parser.error("--objective is of pretraining, and --finetune of fine-tuning: give one")
    results, device = [], find_device(args.device)
    for size in args.sizes:
        setting = Setting(
            size,
            args.batch,
            args.frames,
            args.threads,
            args.default_memory,
            args.finetune,
            str(device),
            args.precision or ("fp32" if device == CPU else "bf16"),
            args.objective,
        )
        results.append(measure(setting, args.repeats, groups=args.groups))
        if not args.json:
            print(_table(results[-1]), flush=True)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
