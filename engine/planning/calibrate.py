"""Fit the plan's formulas to this machine, from a few short runs.

Runs of full depth differ in width, length and batch. The seconds of a step are then split into
those of matmul (as L D^2), attention (L^2 D) and all else (L D) by least squares, none of them
negative; and the memory over what the formulas count is one factor and one constant.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from scipy.optimize import nnls

from ssast.engine.config import Config, load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.flops import PEAK_SHAPE
from ssast.engine.monitoring.gpus import CPU, Gpu, find_gpu
from ssast.engine.parallel.machine import total_gib
from ssast.engine.planning.activations import activations, cpu_attention, element_bytes
from ssast.engine.planning.plan import GIB, count_parameters, memory, step_time
from ssast.engine.planning.trial import Trial, try_out
from ssast.kernels.matmul import fast_matmul, multiplies_bf16

# Recipe, frames, masked patches, clips.
PROBES = (
    ("tiny_patch", 1024, 400, 12),
    ("tiny_patch", 384, 150, 8),
    ("small_patch", 1024, 400, 4),
)
PRIOR = 0.05  # weight of what is usual, against one run
_USUAL_GB_S = 12.5  # bytes of norms, activations and residuals, which are not only moved
_COPIED = 1 << 25  # floats, more than caches hold


def plain_cpu(precision: Literal["auto", "fp32", "bf16"] = "auto") -> Gpu:
    """Describe this machine's CPU: peaks of a large matmul and copy, and typical shares of them.

    Args:
        precision: As ``train.precision``; auto: bf16 where the CPU multiplies it natively.
    """
    if precision == "auto":
        precision = "bf16" if multiplies_bf16() else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(shape).to(dtype) for shape in (PEAK_SHAPE[:2], PEAK_SHAPE[1:]))
    with fast_matmul():
        matmul_s = _least_seconds(lambda: left @ right)
    source, target = torch.ones(_COPIED), torch.empty(_COPIED)
    bandwidth_gb_s = 2 * source.nbytes / _least_seconds(lambda: target.copy_(source)) / 1e9
    flops = 2.0 * PEAK_SHAPE[0] * PEAK_SHAPE[1] * PEAK_SHAPE[2]
    return Gpu(
        name=CPU,
        peak_tflops=flops / matmul_s / 1e12,
        memory_gib=total_gib(),
        bandwidth_gb_s=bandwidth_gb_s,
        per_node=1,
        precision=precision,
        gemm_share=0.95 if precision == "fp32" else 0.75,
        half_width=0.0 if precision == "fp32" else 150.0,
        attention_share=0.65,
        convolution_share=0.5,
        bandwidth_share=_USUAL_GB_S / bandwidth_gb_s,
        launch_us=0.0,
        base_gib=0.7,
        fragmentation=1.25,
    )


def _least_seconds(work: Callable[[], object]) -> float:
    """Return the least CPU seconds per thread of a few turns of some work."""
    seconds = []
    for _ in range(4):
        begin = time.process_time()
        work()
        seconds.append((time.process_time() - begin) / torch.get_num_threads())
    return min(seconds)


def calibrate(
    say: Callable[[str], None],
    run: Callable[..., Trial] = try_out,
    *,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Gpu:
    """Measure this machine's first device.

    Args:
        say: Called with a line about each run.
        run: Runs a trial of a configuration.
        precision: On a CPU, see :func:`plain_cpu`.

    Raises:
        ConfigError: A run failed, or the device is not known.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        gpu = find_gpu(device)
        if gpu is None:
            raise ConfigError(f"--calibrate: {device} is unknown: describe it in a file for --gpu")
    else:
        gpu = plain_cpu(precision)
    configs, trials = [], []
    for recipe, frames, masked, batch in PROBES:
        batch *= 1 if gpu.is_cpu else 8
        config = load_config(
            recipe,
            [
                f"audio.num_frames={frames}",
                f"objective.num_masked={masked}",
                f"train.batch_size={batch}",
                f"train.precision={gpu.precision}",
            ],
        )
        trial = run(config, seconds=10.0, max_steps=8)
        if trial.outcome != "ok":
            raise ConfigError(f"--calibrate: {recipe}: {trial.outcome}: {trial.reason}")
        say(
            f"{recipe}, {frames} frames, {batch} clips: {trial.least_s:.3f} s a step, "
            f"{trial.memory_gib:.2f} GiB"
        )
        configs.append(config)
        trials.append(trial)
    return fit(gpu, configs, trials)


def fit(gpu: Gpu, configs: list[Config], trials: list[Trial]) -> Gpu:
    """Fit the shares of a device to trials.

    Args:
        gpu: Device with known peaks.
        configs: Configurations of the trials.
        trials: Their results.
    """
    rows = []
    for config in configs:
        parts = step_time(
            config,
            gpu,
            count_parameters(config),
            world_size=1,
            batch=config.train.batch_size,
            stage=1,
        )
        rows.append([parts.matmul, parts.attention, parts.elementwise + parts.optimizer])
    seconds = np.array([trial.least_s for trial in trials])
    # Relative errors count: each row is divided by its time. What the runs do not determine stays
    # near the shares as they were.
    system = np.vstack([np.array(rows) / seconds[:, None], PRIOR * np.eye(3)])
    factors, _ = nnls(system, np.concatenate([np.ones(len(rows)), np.full(3, PRIOR)]))
    matmul, attention, rest = (float(1 / max(factor, 0.05)) for factor in factors)
    fitted = replace(
        gpu,
        gemm_share=gpu.gemm_share * matmul,
        attention_share=gpu.attention_share * attention,
        bandwidth_share=gpu.bandwidth_share * rest,
    )
    if not gpu.is_cpu:
        return fitted
    kept, base = [], []
    for config, trial in zip(configs, trials, strict=True):
        batch, parameters = config.train.batch_size, count_parameters(config)
        kept.append(activations(config, batch, element_bytes(gpu), None, cpu_attention(gpu)))
        need = memory(config, gpu, parameters, world_size=1, batch=batch, stage=1)
        base.append(trial.memory_gib * GIB - (need.total - need.activations - need.base))
    system = np.stack([np.array(kept) / GIB, np.ones(len(kept))], 1)
    usual = np.array([[PRIOR, 0.0]])
    (factor, constant), _ = nnls(
        np.vstack([system, usual]), np.append(np.array(base) / GIB, PRIOR * gpu.fragmentation)
    )
    return replace(fitted, fragmentation=max(1.0, float(factor)), base_gib=float(constant))


def write_gpu(gpu: Gpu, path: Path) -> None:
    """Write a file that ``--gpu`` reads."""
    rounded = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in dataclasses.asdict(gpu).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(rounded, sort_keys=False))
