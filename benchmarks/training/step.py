"""A training step against the published one, on this machine's CPU.

Both train the same weights on the same filterbanks; masks, forward, backward and Adam are inside
the step. In pretraining it is the joint one; in fine-tuning patches are 10 mel bins and 10 frames
apart, there are 527 classes, and augmentations are left out on both sides. Each side runs in
a process of its own, as in practice, and they take turns, so that whatever else runs on the machine
disturbs both alike. The ratio is the median over the turns.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.nn.functional import one_hot

from ssast.benchmarks.training.baseline import (
    Baseline,
    ClassifierBaseline,
    published_optimizer,
    train_step,
)
from ssast.benchmarks.training.ours import OurStep
from ssast.engine.config import Config, from_plain
from ssast.engine.errors import ConfigError
from ssast.engine.model.classifier import LossClassifier
from ssast.engine.model.objective import MSPM
from ssast.engine.monitoring.flops import PEAK_SHAPE, step_flops_per_clip
from ssast.engine.planning.synthetic import NUM_CLASSES, noise
from ssast.engine.settings import SIZES
from ssast.engine.train.memory import keep_freed_memory
from ssast.kernels.matmul import fast_matmul


@dataclass(frozen=True)
class Setting:
    """Size of what both sides compute."""

    size: str
    batch: int
    frames: int
    threads: int
    default_memory: bool  # leave the C library's allocator as it is in our process too
    finetune: bool = False  # instead of pretraining

    def config(self, *, two_pass: bool = False) -> Config:
        """Return the patch model's configuration, with its share of masked patches: 400 of 512."""
        if self.finetune:
            return from_plain(
                {
                    "model": {"size": self.size},
                    "audio": {"num_frames": self.frames},
                    "finetune": {"stride": [10, 10], "loss": "bce"},
                }
            )
        num_masked = round(400 / 512 * 8 * (self.frames // 16))
        return from_plain(
            {
                "model": {"size": self.size},
                "audio": {"num_frames": self.frames},
                "objective": {"num_masked": num_masked, "two_pass": two_pass},
            }
        )

    def fbank(self) -> torch.Tensor:
        """Return log-mel filterbanks [B, T, F]."""
        return noise(self.config(), self.batch)

    def targets(self) -> torch.Tensor:
        """Return targets [B, C], one class a clip."""
        return one_hot(torch.arange(self.batch) % NUM_CLASSES, NUM_CLASSES).float()


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
    """What was measured; seconds are those of one step."""

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


def _published_step(setting: Setting) -> Callable[[], None]:
    config, fbank = setting.config(), setting.fbank()
    module = OurStep(config, fbank).task.module
    # The published data loader normalises before the step.
    x = (fbank - config.audio.mean) / (2 * config.audio.std)
    model: Baseline | ClassifierBaseline
    batch: tuple[torch.Tensor, ...] = (x,)
    if isinstance(module, MSPM):
        model = Baseline(config, module)
    else:
        assert isinstance(module, LossClassifier)
        model, batch = ClassifierBaseline(config, module), (x, setting.targets())
    optimizer = published_optimizer(model)

    def step() -> None:
        train_step(model, optimizer, *batch)

    return step


def _work(connection: Connection, name: str, setting: Setting) -> None:
    """Answer every message with the time of a step or of a large matmul."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    random.seed(0)
    if name == "ours" and not setting.default_memory:
        keep_freed_memory()
    published = name == "baseline"
    step = _published_step(setting) if published else OurStep(setting.config(), setting.fbank())
    tasks = {"step": lambda: timed(step), "peak": lambda: peak_gflops(product_s()[0])}
    with fast_matmul() if name == "ours" else nullcontext():  # as ssast pretrain does
        for task in iter(connection.recv, None):
            connection.send(tasks[task]())


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds (of all threads) and wall-clock seconds of a call."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def product_s(dtype: torch.dtype = torch.float32, turns: int = 3) -> tuple[float, float]:
    """Return the least CPU and wall-clock seconds of a matmul of :data:`PEAK_SHAPE`."""
    M, K, N = PEAK_SHAPE
    left, right = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    out = torch.empty(M, N, dtype=dtype)
    times = [timed(lambda: torch.mm(left, right, out=out)) for _ in range(turns + 1)][1:]
    return min(cpu_s for cpu_s, _ in times), min(wall_s for _, wall_s in times)


def peak_gflops(seconds: float) -> float:
    """Return GFLOP/s, where a matmul of :data:`PEAK_SHAPE` takes so long."""
    return 2e-9 * math.prod(PEAK_SHAPE) / seconds


def measure(setting: Setting, repeats: int) -> Result:
    """Time both sides in turns.

    Args:
        setting: What to compute.
        repeats: Turns that count, at least 2; one before them does not.
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
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(None)
        worker.join()
    baseline, ours = zip(*turns, strict=True)
    gflop = step_flops_per_clip(setting.config()) * setting.batch / 1e9
    return Result(
        setting,
        Quartiles.of([cpu for cpu, _ in baseline]),
        Quartiles.of([wall for _, wall in baseline]),
        Quartiles.of([cpu for cpu, _ in ours]),
        Quartiles.of([wall for _, wall in ours]),
        Quartiles.of([b[0] / o[0] for b, o in turns]),
        Quartiles.of([b[1] / o[1] for b, o in turns]),
        gflop,
        gflop / statistics.median(cpu for cpu, _ in ours),
        max(peaks),
        loss_difference(setting),
    )


@torch.no_grad()
def loss_difference(setting: Setting) -> float:
    """Return the relative difference of the losses of the same weights and masks."""
    torch.manual_seed(0)
    setting = replace(setting, batch=min(setting.batch, 2))
    config, fbank = setting.config(two_pass=True), setting.fbank()
    step = OurStep(config, fbank)
    task, x = step.task, step.task.encoder.embed.normalise(fbank)
    inputs, valid = task.inputs(next(step.batches), training=True)
    ours = task.means(task.module(*inputs), valid)["loss"].item()
    if isinstance(task.module, MSPM):
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
    rows = [
        f"{'fine-tuning' if s.finetune else 'pretraining'} {s.size}, {s.frames} frames, "
        f"batch {s.batch}, {s.threads} threads; "
        "median (quartiles) of one step",
        _row("", "CPU s", "wall s"),
        _row("published step", f"{result.baseline_cpu_s:.2f}", f"{result.baseline_wall_s:.2f}"),
        _row("this project", f"{result.ours_cpu_s:.2f}", f"{result.ours_wall_s:.2f}"),
        _row("times faster", f"{result.cpu_ratio:.2f}", f"{result.wall_ratio:.2f}"),
        f"  {result.gflop:.0f} GFLOP a step: {result.gflops_per_cpu_s:.0f} GFLOP per CPU second, "
        f"{result.gflops_per_cpu_s / peak:.0%} of a large matrix product's {peak:.0f}",
        f"  loss of the same weights: relative difference {result.loss_difference:.1e}",
    ]
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
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    args = parser.parse_args(argv)
    if args.repeats < 2 or args.frames < 32:
        parser.error("needs at least 2 repeats and 32 frames")
    results = []
    for size in args.sizes:
        setting = Setting(
            size, args.batch, args.frames, args.threads, args.default_memory, args.finetune
        )
        results.append(measure(setting, args.repeats))
        if not args.json:
            print(_table(results[-1]), flush=True)
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
