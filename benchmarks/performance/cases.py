"""The sections of ``ssast bench performance``: cases by key, each a function that measures it."""

import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch

from ssast.benchmarks.device import timed, use_device
from ssast.benchmarks.loading.data import measure as measure_loaders
from ssast.benchmarks.loading.data import spec_of, write_clips
from ssast.benchmarks.performance.prediction import prediction_cases
from ssast.benchmarks.performance.store import Case, Scope
from ssast.benchmarks.training.ours import OurStep
from ssast.benchmarks.training.processes import Sample, in_process, measure, start, take_steps
from ssast.benchmarks.training.setting import Setting
from ssast.benchmarks.training.step import peak_gflops, product_s
from ssast.benchmarks.training.variants import DEFAULT, OPTIONS, VARIANTS, Variant
from ssast.engine.config import load_config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.monitor import read_metrics, scalars
from ssast.engine.monitoring.profiling import StepProfiler
from ssast.engine.planning.trial import try_out
from ssast.engine.settings import Profile, Run
from ssast.pipelines.clips.manifest import read_clips, write_manifest
from ssast.pipelines.clips.shards import ClipPath, ShardClip

REPEATS = {"tiny": 2, "small": 2, "base": 1}  # processes of each variant
MAX_STEPS, STEPS_S = 5, 6.0  # measured steps of a process, and seconds for them
PROFILED_STEPS = 3
SCALING_STEPS, PEAK_REPEATS = 3, 10
# Peaks by the variant of the step whose matmul is measured.
PEAKS = {"fp32": "published", "fp32 by AVX-512": "fast matmul", "bf16": "bf16"}
KINDS, CLIP_SECONDS = ("flac", "wav", "ogg"), (1.0, 10.0)
RUN_STEPS = {"demo": 240, "long": 24}
LOG_LINES, VALID_CLIPS = 6, 16  # of a run
QUIET = {"KINETO_LOG_LEVEL": "99"}  # else the profiler logs every start and stop


def sections(scope: Scope) -> dict[str, dict[str, Case]]:
    """Return all cases by section and key, in the order of measurement."""
    return {
        **{f"step-{size}": step_cases(scope, size) for size in scope.sizes},
        "roofline": roofline_cases(scope),
        "scaling": scaling_cases(scope),
        "loader": loader_cases(scope),
        "predict": prediction_cases(scope),
        "runs": run_cases(scope),
    }


def step_cases(scope: Scope, size: str) -> dict[str, Case]:
    """Return the variants of the step, alternating so that other load disturbs all alike."""
    repeats = scope.repeats or REPEATS.get(size, 1)
    return {
        f"{name}, repeat {repeat}": partial(_step, variant, scope.setting(size))
        for repeat in range(1, repeats + 1)
        for name, variant in {**VARIANTS, **OPTIONS}.items()
        if not scope.variants or name in scope.variants
    }


def _step(variant: Variant, setting: Setting) -> dict[str, Any]:
    found = measure(variant, setting, MAX_STEPS, STEPS_S)
    return {"left_out": found} if isinstance(found, str) else asdict(found)


def roofline_cases(scope: Scope) -> dict[str, Case]:
    """Return the peaks of the machine and the profiles of a step."""
    cases: dict[str, Case] = {
        f"peak {name}": partial(in_process, _peaks, name, scope.setting()) for name in PEAKS
    }
    for size in scope.sizes:
        setting = scope.setting(size)
        cases[f"profile {size}"] = partial(in_process, _profile, setting, PROFILED_STEPS, env=QUIET)
    return cases


def _peaks(name: str, setting: Setting) -> dict[str, Any]:
    """Measure the fastest of some large copies and matmuls in wall-clock time."""
    device = torch.device(setting.device)
    use_device(device)
    torch.set_num_threads(setting.threads)
    variant = VARIANTS[PEAKS[name]] if PEAKS[name] in VARIANTS else OPTIONS[PEAKS[name]]
    with variant.prepared(device) as lacking:
        if lacking:
            return {"left_out": lacking}
        source = torch.ones(1 << 26, device=device)
        target = torch.empty_like(source)
        copy_s = min(timed(lambda: target.copy_(source), device)[1] for _ in range(PEAK_REPEATS))
        return {
            "gb_per_s": 2e-9 * source.nbytes / copy_s,
            "gflop_per_s": peak_gflops(product_s(variant.dtype, PEAK_REPEATS, device)[1]),
        }


def _profile(setting: Setting, steps: int) -> dict[str, Any]:
    """Profile a step: milliseconds of its parts."""
    device = torch.device(setting.device)
    use_device(device)
    torch.set_num_threads(setting.threads)
    with DEFAULT.prepared(device), tempfile.TemporaryDirectory() as folder:
        config = replace(
            DEFAULT.config(setting), run=Run(folder=folder), profile=Profile(steps=steps)
        )
        step = OurStep(config, setting.fbank(), deepspeed=True)
        torch.set_num_threads(setting.threads)
        task = step.task
        with StepProfiler(
            config, task.context.world, task.module, lambda text: None, warmup_steps=1
        ) as profiler:
            for _ in range(1 + steps):
                step(mark=profiler.mark)
                profiler.end_step()
        return json.loads((Path(folder) / "profile" / "table.json").read_text())


def scaling_cases(scope: Scope) -> dict[str, Case]:
    """Return the default step with other batches, lengths, threads and numbers of processes."""
    whole = scope.setting()
    cases: dict[str, Case] = {}

    def add(key: str, **changes: Any) -> None:
        cases[key] = partial(_rate, replace(whole, **changes))

    for batch in (2**k for k in range(5) if 2**k <= 2 * scope.batch):
        add(f"batch {batch}", batch=batch)
    for frames in (scope.frames // n for n in (8, 4, 2, 1) if scope.frames // n >= 32):
        add(f"frames {frames}", frames=frames)
    for threads in (n for n in (1, 2, 4, 8, 16, scope.threads) if n <= scope.threads):
        add(f"threads {threads}", threads=threads)
    if not whole.on_gpu or torch.cuda.device_count() > 1:
        half = replace(whole, batch=whole.batch // 2, threads=1)
        cases["processes 2"] = partial(_processes, half, 2)
    return cases


def _rate(setting: Setting) -> dict[str, float]:
    found = measure(DEFAULT, setting, SCALING_STEPS)
    assert isinstance(found, Sample)  # the default runs everywhere
    return _clips_per_s(setting, [found])


def _clips_per_s(setting: Setting, ranks: Sequence[Sample]) -> dict[str, float]:
    """Return the throughput and memory of ranks with a batch each."""
    wall_s = max(statistics.median(sample.wall_s) for sample in ranks)
    memory_gib = sum(sample.memory_gib for sample in ranks)
    return {"clips_per_s": len(ranks) * setting.batch / wall_s, "memory_gib": memory_gib}


def _processes(setting: Setting, count: int) -> dict[str, float]:
    """Run the step on several ranks, each with the batch and threads of the setting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = []
    for rank in map(str, range(count)):
        env = {**world, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(count)}
        own = replace(setting, device=f"cuda:{rank}") if setting.on_gpu else setting
        results.append(start(take_steps, DEFAULT, own, SCALING_STEPS, env=env))
    return _clips_per_s(setting, [result() for result in results])


def loader_cases(scope: Scope) -> dict[str, Case]:
    """Return the audio stream against plain loaders, by file type and length."""
    return {
        f"{kind}, {seconds:g} s": partial(_loaders, scope, kind, seconds)
        for kind in KINDS
        for seconds in CLIP_SECONDS
    }


def _loaders(scope: Scope, kind: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = measure_loaders(
            write_clips(Path(folder), scope.clips, seconds=seconds, kind=kind),
            spec_of(seconds),
            batch_size=min(16, scope.clips),
            num_threads=scope.threads,
            rounds=3,
            seconds=seconds,
            device=torch.device(scope.device),
        )
    return asdict(found)


def run_cases(scope: Scope) -> dict[str, Case]:
    """Return short runs of ``ssast pretrain`` on files, with their steps alone."""
    masked = scope.setting().config().objective.num_masked
    long = [
        f"audio.num_frames={scope.frames}",
        f"objective.num_masked={masked}",
        f"train.batch_size={scope.batch}",
    ]
    return {
        "demo": partial(_run, scope, "demo", [], RUN_STEPS["demo"]),
        "demo's recordings": partial(_run, scope, "tiny_patch", long, RUN_STEPS["long"]),
        "10 s FLAC": partial(_run, scope, "tiny_patch", long, RUN_STEPS["long"], synthetic=True),
    }


def _run(
    scope: Scope, recipe: str, overrides: list[str], steps: int, *, synthetic: bool = False
) -> dict[str, Any]:
    """Run pretraining; return medians of all log lines but the first, and the step alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = Path(scope.data) / "train.json"
        if synthetic:
            train = folder / "clips.json"
            write_manifest(train, write_clips(folder, scope.clips))
        clips = read_clips(train)
        settings = [
            f"data.train={train}",
            f"data.valid_share={min(0.5, VALID_CLIPS / len(clips))}",
            f"data.num_threads={scope.threads}",
            f"run.folder={folder / 'run'}",
            f"train.steps={steps}",
            f"train.log_every={max(1, steps // LOG_LINES)}",
            f"train.validate_every={steps}",
            f"train.save_every={steps}",
        ]
        command = [*("ssast.engine.cli", "pretrain", recipe), *overrides, *settings]
        env = {**os.environ, "OMP_NUM_THREADS": str(scope.threads)}
        if scope.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, "-m", *command], env=env, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise ConfigError(f"ssast {' '.join(command[1:])} ended with {done.returncode}: {last}")
        lines = read_metrics(folder / "run" / "metrics.jsonl")
        some = [_duration_s(clip) for clip in clips[:: max(1, len(clips) // 100)]]
    rates = {
        key: statistics.median(value for _, value in scalars(lines, f"perf/{key}")[1:])
        for key in ("clips_per_s", "data_wait_share")
    }
    config = load_config(recipe, [*overrides, "data.train=null"])
    alone = try_out(config, seconds=5.0, num_threads=scope.threads)
    return {
        "command": " ".join(["ssast pretrain", recipe, *overrides]),
        "steps": steps,
        "clip_s": statistics.mean(some),
        **rates,
        "clips_per_s_alone": alone.clips_per_s,
    }


def _duration_s(clip: ClipPath) -> float:
    file = io.BytesIO(clip.read()) if isinstance(clip, ShardClip) else clip
    return soundfile.info(file).duration
