"""Measure a variant of the training step in a process of its own.

Only one such process is alive at a time, so that it has the machine, and what it keeps in memory
goes with it. A process that keeps freed memory takes one step more, the first, which does not
count: there it asks for the memory once and for all.
"""

import math
import multiprocessing
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ssast.benchmarks.device import timed, use_device
from ssast.benchmarks.training.setting import Setting
from ssast.benchmarks.training.step import GPU_STEPS, peak_gflops, product_s
from ssast.benchmarks.training.variants import Variant, check_mask_ids
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.monitor import peak_memory_gib


@dataclass(frozen=True)
class Sample:
    """Measurements of one process.

    Attributes:
        cpu_s: CPU seconds of each step, over all threads; on a GPU, means over some steps.
        wall_s: Wall-clock seconds, or seconds of the GPU, likewise.
        loss: Loss of the first step: fresh weights, the masks that all variants are compared on.
        memory_gib: Highest resident memory of the process.
        peak_gflops: Rate of a large matmul per CPU second (or second of the GPU), in the precision
            and by the library of the variant's.
    """

    cpu_s: list[float]
    wall_s: list[float]
    loss: float
    memory_gib: float
    peak_gflops: float


def measure(
    variant: Variant, setting: Setting, most: int, seconds: float = math.inf
) -> Sample | str:
    """Take some steps in a new process; return why, if this machine cannot.

    Args:
        variant: Variant of the step.
        setting: Size of what it computes.
        most: Largest number of steps that count.
        seconds: Time after which no other step is begun; one is taken in any case.

    Raises:
        ConfigError: The process ended without a result.
    """
    return in_process(take_steps, variant, setting, most, seconds)


def take_steps(
    variant: Variant, setting: Setting, most: int, seconds: float = math.inf
) -> Sample | str:
    """Do in this process what :func:`measure` does in a new one."""
    device = torch.device(setting.device)
    use_device(device)
    torch.set_num_threads(setting.threads)
    random.seed(0)
    with variant.prepared(device) as lacking:
        if lacking:
            return lacking
        # First, as it wakes the libraries up.
        peak = peak_gflops(product_s(variant.dtype, device=device)[setting.on_gpu])
        step, masks = variant.build(setting), check_mask_ids(setting)
        losses: list[float] = []

        def run() -> None:
            losses.append(step(None if losses else masks))

        count = 1
        if variant.keep_memory or setting.on_gpu:
            run()
        if setting.on_gpu:
            count = GPU_STEPS
            for _ in range(count):  # libraries and allocators settle
                run()
        times = [timed(run, device, count)]
        while len(times) < most and sum(wall_s for _, wall_s in times) * count < seconds:
            times.append(timed(run, device, count))
    cpu_s, wall_s = (list(column) for column in zip(*times, strict=True))
    return Sample(cpu_s, wall_s, losses[0], peak_memory_gib(device), peak)


def in_process(task: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None) -> Any:
    """Call a function in a new process; return its result.

    Args:
        task: Of a module; it and what it is given and returns can be pickled.
        arguments: Of the function.
        env: Variables of the environment.

    Raises:
        ConfigError: The process ended without a result.
    """
    return start(task, *arguments, env=env)()


def start(
    task: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None
) -> Callable[[], Any]:
    """Start what :func:`in_process` does; return a function that waits for the result."""
    # Forked from a process that has imported this module, and done nothing else yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, env or {}, task, arguments))
    process.daemon = True
    process.start()
    theirs.close()

    def result() -> Any:
        try:
            found = ours.recv()
        except EOFError:
            found = None
        process.join()
        if found is None:
            raise ConfigError(f"a process ended with status {process.exitcode} and no result")
        return found

    return result


def _answer(
    connection: Connection, env: dict[str, str], task: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(env)
    connection.send(task(*arguments))
    connection.close()
