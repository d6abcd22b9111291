"""Precision of a run on a CPU under ``train.precision: auto``.

Bf16 is used where the processor multiplies it natively (AVX512-BF16, AMX) and a trial at the start,
on clips of the first batch, is faster than fp32 with a loss and gradients that are as exact as bf16
can be; else fp32. A run that is resumed keeps what it had.
"""

import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssast.engine.checkpoints.store import Checkpoints
from ssast.engine.parallel.ranks import reduce_max, run_on_main
from ssast.engine.settings import Precision
from ssast.engine.train.execution import pass_in, relative_errors
from ssast.engine.train.task import Task
from ssast.kernels.matmul import multiplies_bf16
from ssast.pipelines.stream.batch import Batch
from ssast.pipelines.text import one_line

LOSS_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 0.25
MATRIX_TOLERANCE = 0.75
"""Largest errors under bf16 of the loss, of all gradients as one vector, and of the gradient of a
weight matrix, relative to their norms. When training begins they are up to 4e-4, 0.13 and 0.41; a
wrong gradient has 1 or more. Those of biases and norms are sums that nearly cancel: up to 0.7."""

LEAST_PASSES = 200  # a trial costs as much as some 20, and bf16 saves a third of each
_FRAMES = 4096  # of the clips that are tried: passes of a second, whatever the batch
_ROUNDS = 3
_MARGIN = 1.1  # of time: the optimizer's step is slower under bf16


class Choice(NamedTuple):
    """A precision, and why."""

    precision: Precision
    reason: str


def choose_precision(task: Task, resumed: Path | None) -> Choice | None:
    """Choose the precision of a run whose engine is not built yet, and set it. Collective.

    Args:
        task: What is trained, its weights in fp32.
        resumed: Checkpoint that the run is resumed from, if any.

    Returns:
        The choice; None where there is none: on a GPU, or with ``train.precision`` set.
    """
    context = task.context
    if context.config.train.precision != "auto" or context.world.device.type != "cpu":
        return None
    choice = _choose(task, resumed)
    context.set_precision(choice.precision)
    return choice


def _choose(task: Task, resumed: Path | None) -> Choice:
    train, world = task.context.config.train, task.context.world
    if reduce_max([float(not multiplies_bf16())], world)[0]:
        return Choice("fp32", "this CPU has no instructions for bf16")
    if resumed is not None:
        stored = run_on_main(lambda: _stored(resumed), world)
        return Choice("bf16" if stored == "bf16" else "fp32", "as in the checkpoint")
    passes = train.steps * train.accumulation_steps
    if passes < LEAST_PASSES:
        return Choice("fp32", f"{passes} passes are too few to repay a trial of bf16")
    task.context.heartbeat("a trial of bf16")
    reason, fp32_ms, bf16_ms = "", 0.0, 0.0
    try:
        reason, fp32_ms, bf16_ms = _try(task)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # an operation without bf16
        reason = f"{type(error).__name__}: {one_line(error):.200}"
    failed, fp32_ms, bf16_ms = reduce_max([float(bool(reason)), fp32_ms, bf16_ms], world)
    if failed:
        return Choice("fp32", reason or "another rank cannot use bf16")
    times = f"a trial took {bf16_ms:.0f} ms under bf16 and {fp32_ms:.0f} ms under fp32"
    return Choice("bf16" if bf16_ms * _MARGIN < fp32_ms else "fp32", times)


def _stored(checkpoint: Path) -> str:
    """Return the precision of the run that wrote a checkpoint; one that is older had fp32."""
    return str(Checkpoints.load(checkpoint, check=False)[1].get("precision", "fp32"))


def _try(task: Task) -> tuple[str, float, float]:
    """Return why bf16 cannot be used, or "", and the ms of a pass under fp32 and under bf16."""
    with torch.random.fork_rng(devices=[]):
        with task.train_batches(0) as stream:
            batch = _part(next(stream))
        if not batch.valid.any():
            return "the first batch has no valid clip to try bf16 on", 0.0, 0.0
        passes = [pass_in(task, batch, dtype) for dtype in (torch.float32, torch.bfloat16)]
        exact, rounded = (run() for run in passes)  # the first passes also wake the libraries up
        reason = _wrong(task, exact, rounded)
        if reason:
            return reason, 0.0, 0.0
        del exact, rounded
        rounds = [[_milliseconds(run) for run in passes] for _ in range(_ROUNDS)]
    fp32_ms, bf16_ms = (min(column) for column in zip(*rounds, strict=True))
    return "", fp32_ms, bf16_ms


def _part(batch: Batch) -> Batch:
    """Return the first valid clips of a batch, of some ``_FRAMES`` frames together."""
    rows = batch.valid.nonzero()[:, 0][: max(1, _FRAMES // batch.fbank.shape[1])]
    return type(batch)(**{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})


def _wrong(task: Task, exact: list[Tensor], rounded: list[Tensor]) -> str:
    """Return the first error that is more than rounding; else ""."""
    whole = [[r[0], torch.cat([g.flatten().float() for g in r[1:]])] for r in (rounded, exact)]
    loss, gradient = relative_errors(*whole).tolist()
    errors = [("loss", loss, LOSS_TOLERANCE), ("gradient", gradient, GRADIENT_TOLERANCE)]
    trained = [(name, p) for name, p in task.module.named_parameters() if p.requires_grad]
    each = relative_errors(rounded, exact)[1:].tolist()
    errors += [
        (f"gradient of {name}", error, MATRIX_TOLERANCE)
        for error, (name, weight) in zip(each, trained, strict=True)
        if weight.ndim > 1
    ]
    for what, error, allowed in errors:
        if not error <= allowed:  # NaN is
            return f"under bf16 the {what} has a relative error of {error:.1e}"
    return ""


def _milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)
