"""A trial of a configuration: a few training steps in a process of its own.

The process may be killed, run out of memory or hang; the caller gets an answer all the same. What
it does is in :mod:`ssast.engine.planning.trial_process`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any, Literal

from ssast.engine.config import Config, to_plain
from ssast.engine.parallel.machine import available_gib
from ssast.engine.registry import BACKBONES, OBJECTIVES
from ssast.engine.settings import Run
from ssast.pipelines.cores import spinning

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "MemoryError")


@dataclass(frozen=True)
class Trial:
    """The outcome of a trial.

    Attributes:
        outcome: "ok", or why there are no numbers.
        reason: The last line of an error.
        step_s: Median seconds of a step.
        least_s: Seconds of the fastest step; on a CPU, the least CPU seconds per thread, which do
            not depend on what else runs there.
        clips_per_s: Rate of this process.
        memory_gib: Highest memory: of the device, or resident on a CPU.
        base_gib: The same before there was a model.
    """

    outcome: Literal["ok", "out of memory", "too slow", "failed"]
    reason: str = ""
    step_s: float = float("nan")
    least_s: float = float("nan")
    clips_per_s: float = float("nan")
    memory_gib: float = float("nan")
    base_gib: float = float("nan")


def try_out(
    config: Config,
    *,
    seconds: float = 20.0,
    max_steps: int = 20,
    num_threads: int | None = None,
    memory_gib: float | None = None,
    timeout_s: float = 300.0,
) -> Trial:
    """Run a few steps of a configuration on this machine.

    Args:
        config: Configuration of one process; ``train.batch_size`` is that process's. Clips are read
            where ``data.train`` or ``data.mix`` is set; else one batch of noise stands for them.
        seconds: Time for the steps that count; at least three, or two steps in all if they are
            long, are taken all the same.
        max_steps: Largest number of steps that count.
        num_threads: Threads of PyTorch; its own choice if None.
        memory_gib: What a CPU process may allocate; what is free now, less a tenth, if None.
        timeout_s: Seconds after which the process is killed.

    Raises:
        ConfigError: Objective or backbone are registered in this process alone.
    """
    BACKBONES.check_elsewhere(config.model.backbone)
    if config.finetune is None:
        OBJECTIVES.check_elsewhere(config.objective.kind)
    with tempfile.TemporaryDirectory() as folder:  # for what a run would log of its clips
        request = {
            "config": to_plain(replace(config, run=Run(folder=folder))),
            "seconds": seconds,
            "max_steps": max_steps,
            "memory_gib": memory_gib or 0.9 * available_gib(),
        }
        return _run(request, num_threads, timeout_s)


def _run(request: dict[str, Any], num_threads: int | None, timeout_s: float) -> Trial:
    env = {**os.environ, **spinning()}
    if num_threads is not None:
        env["OMP_NUM_THREADS"] = str(num_threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "ssast.engine.planning.trial_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(request), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Trial("too slow", f"no result within {timeout_s:.0f} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's processes
            process.communicate()
    if process.returncode == 0:
        return Trial(**json.loads(out.splitlines()[-1]))
    lines = [line for line in err.splitlines() if line.strip()] or [""]
    if any(sign in err for sign in _OUT_OF_MEMORY) or process.returncode == -signal.SIGKILL:
        return Trial("out of memory", lines[-1])
    return Trial("failed", lines[-1] or f"exit status {process.returncode}")
