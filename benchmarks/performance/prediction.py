"""Prediction and embedding from files: the commands against the loop that one would write.

Both read the same folder of transformers, with fresh weights, and the same clips of 10 s. Each
command line is run for one clip and for all clips: the first is its start-up, the difference is
what the others take.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from ssast.benchmarks.loading.data import write_clips
from ssast.benchmarks.performance.store import Case, Scope
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.kernels.matmul import multiplies_bf16

OURS = {"predict": "ssast predict", "embed": "ssast embed"}
CLIPS = {"tiny": 32, "small": 32}  # of a run, else BASE_CLIPS
BASE_CLIPS = 8
STARTS = 2  # runs with one clip, of which the faster counts
NUM_CLASSES = 10


def prediction_cases(scope: Scope) -> dict[str, Case]:
    """Return both commands, and the loop with one clip and with many at a time, of each size.

    The commands are also run with ``--precision bf16``, where the device multiplies it natively.
    """
    cases: dict[str, Case] = {}
    for size in scope.sizes:
        count = clip_count(size)
        for what, name in OURS.items():
            cases[f"{size}: {name}"] = partial(_run, scope, size, what, None)
            for batch in (1, count):
                cases[f"{size}: {what} by a loop, batch {batch}"] = partial(
                    _run, scope, size, what, batch
                )
            if scope.device != "cpu" or multiplies_bf16():
                bf16 = partial(_run, scope, size, what, None, ("--precision", "bf16"))
                cases[f"{size}: {name}, bf16"] = bf16
    return cases


def clip_count(size: str) -> int:
    """Return the number of clips that a size is measured on."""
    return CLIPS.get(size, BASE_CLIPS)


def save_model(folder: Path, size: str) -> None:
    """Write a classifier of transformers with fresh weights."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    width, depth, heads = SIZES[size].embed_dim, SIZES[size].depth, SIZES[size].num_heads
    config = ASTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=NUM_CLASSES,
    )
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor().save_pretrained(folder)


def _run(
    scope: Scope, size: str, what: str, batch: int | None, options: tuple[str, ...] = ()
) -> dict[str, float]:
    count = clip_count(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", size)
        for clips, number in (("one", 1), ("all", count)):
            (folder / clips).mkdir()
            write_clips(folder / clips, number)
        starts = [
            _timed(scope, _command(folder, what, "one", batch, options)) for _ in range(STARTS)
        ]
        cpu_s, wall_s = _timed(scope, _command(folder, what, "all", batch, options))
    return {
        "clips": count,
        "start_cpu_s": min(cpu_s for cpu_s, _ in starts),
        "start_wall_s": min(wall_s for _, wall_s in starts),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
    }


def _command(
    folder: Path, what: str, clips: str, batch: int | None, options: tuple[str, ...]
) -> list[str]:
    """Return what is run after ``python -m``."""
    out = str(folder / f"{time.monotonic_ns()}.npy")
    given = [str(folder / "model"), str(folder / clips)]
    if batch is None:
        given += ["--out", out] if what == "embed" else []
        return ["ssast.engine.cli", what, *given, *options]
    program = ["ssast.benchmarks.performance.plain_loop", *given, str(batch)]
    return [*program, *(["--embed", out] if what == "embed" else [])]


def _timed(scope: Scope, command: list[str]) -> tuple[float, float]:
    """Return the CPU and the wall-clock seconds of a process.

    Raises:
        ConfigError: It failed.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(scope.threads), "HF_HUB_OFFLINE": "1"}
    if scope.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True)
    wall_s = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ConfigError(f"python -m {' '.join(command)} ended with {done.returncode}: {last}")
    return (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        wall_s,
    )
