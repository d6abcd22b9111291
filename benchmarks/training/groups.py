"""Where the time of a step goes, by the groups of the ledger (``ssast plan --ledger``).

The profiler tells which operation has launched each kernel; operations are put into groups as those
of the ledger are. Where there is no GPU, the time of an operation is its own on the CPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ssast.benchmarks.training.ours import OurStep
from ssast.engine.config import Config
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.planning.ledger import (
    BACKWARD,
    DATA,
    FORWARD,
    LOSS,
    MARKS,
    SCALARS,
    group_of,
    make_ledger,
)
from ssast.engine.planning.recorder import Launch

_PHASE, _NODE, _OURS = "phase: ", "autograd::engine::evaluate_function: ", "ssast::"
_ATTENTION = ("attention", "attn")  # in names of operations


@dataclass(frozen=True)
class GroupTime:
    """A group of operations: what was measured of it, and what the ledger has.

    Attributes:
        group: Its name.
        ms: Time in a step.
        launches: Kernels, or operations on a CPU, in a step.
        gigabytes: Bytes moved, of the ledger.
        least_ms: Least time on the GPU, of the ledger; None if the device is another one.
    """

    group: str
    ms: float
    launches: float
    gigabytes: float
    least_ms: float | None


def beside_ledger(
    times: dict[str, tuple[float, float]], config: Config, gpu: Gpu, *, measured: bool
) -> list[GroupTime]:
    """Put measured groups beside those of the ledger.

    Args:
        times: Milliseconds and launches of each group, from :func:`measured_groups`.
        config: Configuration of the step, whose batch is that of one micro-batch.
        gpu: GPU of the ledger.
        measured: Whether the step was measured on that GPU.
    """
    rows = make_ledger(config, gpu, config.train.batch_size).rows()
    return [
        GroupTime(
            name,
            *times.get(name, (0.0, 0.0)),
            rows[name].moved / 1e9 if name in rows else 0.0,
            (1e3 * rows[name].seconds if name in rows else 0.0) if measured else None,
        )
        for name in [*rows, *(name for name in times if name not in rows)]
    ]


def measured_groups(step: OurStep, steps: int) -> dict[str, tuple[float, float]]:
    """Profile a step; return milliseconds and launches of each group in it.

    Args:
        step: The step, neither compiled nor a graph.
        steps: Steps to profile, after one that is not.
    """
    on_gpu = step.task.context.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    step.take()
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            with _phases(step.task.module) as mark:
                step.take(mark=mark)
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, tuple[float, float]] = {}
    for event in recorded.events() or ():
        us, launches = _time_of(event, on_gpu)
        launch = launch_of(event)
        if not launches or launch.phase == DATA:
            continue
        ms, count = times.get(name := _group(launch), (0.0, 0.0))
        times[name] = ms + us / 1e3 / steps, count + launches / steps
    return times


@contextmanager
def _phases(module: nn.Module) -> Iterator[Any]:
    """Mark the phases of a step in the profile; yields what is told its parts."""
    with ExitStack() as stack, ExitStack() as current:

        def begin(phase: str) -> None:
            current.close()
            current.enter_context(record_function(_PHASE + phase))

        handles = [
            module.register_forward_pre_hook(lambda *_: begin(FORWARD)),
            module.register_forward_hook(lambda *_: begin(LOSS)),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        yield lambda part: begin(MARKS[part])


def _time_of(event: Any, on_gpu: bool) -> tuple[float, int]:
    """Return microseconds and launches of an operation itself."""
    if event.name.startswith((_PHASE, _NODE)):
        return 0.0, 0
    if on_gpu:
        return sum(kernel.duration for kernel in event.kernels), len(event.kernels)
    return event.self_cpu_time_total, 1


def launch_of(event: Any) -> Launch:
    """Return what the ledger would know of an operation in a profile: its name and place."""
    operation, node, phase = "", "", ""
    parent = event
    while parent is not None:
        name = parent.name
        if name.startswith(_PHASE):
            phase = phase or name.removeprefix(_PHASE)
        elif name.startswith(_NODE):
            node, phase = node or name.removeprefix(_NODE), BACKWARD
        elif name.startswith(_OURS):
            operation = name.removeprefix(_OURS)
        parent = parent.cpu_parent
    name = event.name.partition("::")[2] or event.name
    return Launch(name, phase or DATA, operation, node, 1, 0, 0, 0.0, width=SCALARS + 1)


def _group(launch: Launch) -> str:
    named = launch.operation or launch.name
    if any(word in named for word in _ATTENTION) and launch.phase in (FORWARD, BACKWARD):
        return "attention"
    return group_of(replace(launch, name=launch.name.removeprefix("aten::")))


def format_groups(groups: list[GroupTime]) -> str:
    """Format the groups of a step as a table."""
    known = groups[0].least_ms is not None
    head = ["group", "ms", "launches", "GB (ledger)"]
    lines = ["  " + "".join(f"{h:>14}" for h in head + ["least ms", "of least"] * known)]
    for g in groups:
        cells = [g.group, f"{g.ms:.3f}", f"{g.launches:.0f}", f"{g.gigabytes:.3f}"]
        if g.least_ms is not None:
            cells += [f"{g.least_ms:.3f}", f"{g.least_ms / g.ms:.0%}" if g.ms else ""]
        lines.append("  " + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
