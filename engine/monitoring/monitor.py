"""Metrics of a run: the terminal, metrics.jsonl and run logs; and the environment it ran in.

``metrics.jsonl`` has one JSON object a line: ``step``, ``time`` (Unix time, s) and metrics, under
the same names as in TensorBoard and the other run logs. Every ``train.log_every`` steps, averaged
over the steps since the line before:

    train/loss, train/lr, train/skipped_steps
    train/grad_norm                                                of the last step, unclipped
    train/infonce_loss, train/mse_loss                              pretraining
    train/pretext_accuracy, train/pretext_chance                    pretraining
    train/latent_loss, train/cls_loss                               latent targets
    train/target_std, train/content_std, train/prediction_std       latent targets
    train/accuracy                                                  fine-tuning on single labels
    perf/clips_per_s, perf/step_s                                   of all ranks together
    perf/tflops_per_device, perf/mfu                                mfu: of known accelerators
    perf/data_wait_share, perf/memory_gib                           of rank 0; peak memory so far

After each validation:

    valid/loss
    valid/infonce_loss, valid/mse_loss, valid/pretext_accuracy      pretraining
    valid/latent_loss, valid/cls_loss, ...                          latent targets
    valid/accuracy, valid/map, valid/mauc, valid/macro_f1, ...      fine-tuning; see evaluation
    ema/loss, ...                                                   train.ema: averaged weights

What follows ``train/``, ``valid/`` or ``ema/`` is the name that the module and the metrics use
themselves.
"""

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ssast.engine.monitoring.loggers import Logger, RunLogs
from ssast.engine.parallel.ranks import World
from ssast.pipelines.cores import describe_waiting, find_cores
from ssast.pipelines.files import append, write_atomically
from ssast.pipelines.text import in_notebook, say, shows_progress

# Columns of a training line on the terminal: metric, label, format.
COLUMNS = (
    ("train/loss", "loss", "7.4f"),
    ("train/pretext_accuracy", "pretext acc", "6.1%"),
    ("train/target_std", "target std", "6.3f"),
    ("train/content_std", "content std", "6.3f"),
    ("train/accuracy", "acc", "6.1%"),
    ("train/lr", "lr", ".2e"),
    ("train/grad_norm", "grad norm", "7.3f"),
    ("perf/clips_per_s", "clips/s", "8.1f"),
    ("perf/tflops_per_device", "TFLOP/s", "7.3g"),
    ("perf/mfu", "MFU", "6.1%"),
    ("perf/data_wait_share", "data wait", "6.1%"),
)
PACKAGES = ("ssast-engine", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "flash-attn")


class Monitor:
    """Times the steps of one process and, on rank 0, logs metrics."""

    def __init__(
        self,
        folder: Path,
        *,
        world: World,
        step: int,
        steps: int,
        batch_size: int,
        flops_per_clip: float,
        peak_flops: float | None,
        loggers: Sequence[Logger] = (),
    ):
        """Open the run's logs at a step.

        Args:
            folder: The run's folder.
            world: This process's rank.
            step: Steps already taken; log lines of later steps (the run was killed) are removed.
            steps: Steps of the whole run.
            batch_size: Clips of one step, over all ranks.
            flops_per_clip: FLOPs of one training step, per clip.
            peak_flops: Peak FLOP/s of one device; None if unknown: then there is no MFU.
            loggers: Run logs beside metrics.jsonl.
        """
        self._path, self._world, self._steps = folder / "metrics.jsonl", world, steps
        self._batch_size, self._flops, self._peak = batch_size, flops_per_clip, peak_flops
        self._begin, self._waited, self._since = time.perf_counter(), 0.0, step
        self._unwritten: list[dict[str, Any]] = []  # lines that the disk has refused so far
        self._bar: tqdm | None = None
        self._logs = RunLogs(loggers if world.is_main else (), self.say)
        if not world.is_main:
            return
        self._open(step)
        if shows_progress():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def _open(self, step: int) -> None:
        """Open the logs to append after a step; drop the lines of later steps."""
        kept = _lines(line for line in read_metrics(self._path) if line["step"] <= step)
        # What else is there: later lines, or half of one, to which the next would be appended.
        if not self._path.exists() or self._path.read_bytes() != kept:
            write_atomically(self._path, kept)
        self._logs.open(step)

    def rewind(self, step: int) -> None:
        """Go back to a step: remove the lines of later ones."""
        if self._world.is_main:
            self._logs.close()
            self._unwritten = [line for line in self._unwritten if line["step"] <= step]
            try:
                self._open(step)
            except OSError as error:  # a full disk
                self.say(f"lines after step {step} stay in the logs: {error}")
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        self.restart_clock(step)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as time spent waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def restart_clock(self, step: int) -> None:
        """Leave the time (of a validation, say) and the steps up to here out of the rates."""
        self._begin, self._waited, self._since = time.perf_counter(), 0.0, step

    def log_train(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Log training metrics and the throughput of the steps since the last call; return all.

        Args:
            step: Steps taken.
            values: Metrics without their prefix, such as "loss" and "lr".
        """
        metrics = {f"train/{name}": value for name, value in values.items()}
        metrics |= {"perf/memory_gib": peak_memory_gib(self._world.device)}
        num_steps = step - self._since
        if num_steps:  # else a validation has just restarted the clock
            metrics |= self._rates(num_steps)
        self.log(step, metrics)
        shown = {
            label: format(metrics[name], spec) for name, label, spec in COLUMNS if name in metrics
        }
        if self._bar is not None:
            self._bar.set_postfix({k: v.strip() for k, v in shown.items()}, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            text = "  ".join(f"{label} {value}" for label, value in shown.items())
            if num_steps:
                text += f"  ETA {duration((self._steps - step) * metrics['perf/step_s'])}"
            self.say(f"{self._at(step)}  {text}")
        self.restart_clock(step)
        return metrics

    def _rates(self, num_steps: int) -> dict[str, float]:
        """Return the throughput of the steps since the last call."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        clips_per_s = num_steps * self._batch_size / seconds
        flops = clips_per_s * self._flops / self._world.world_size
        rates = {
            "perf/clips_per_s": clips_per_s,
            "perf/step_s": seconds / num_steps,
            "perf/tflops_per_device": flops / 1e12,
            "perf/data_wait_share": self._waited / seconds,
        }
        return rates | ({"perf/mfu": flops / self._peak} if self._peak else {})

    def log_environment(self, **facts: Any) -> None:
        """Write facts about the run to ``environment.json``, besides those that are there."""
        if not self._world.is_main:
            return
        path = self._path.with_name("environment.json")
        try:
            known = json.loads(path.read_text()) if path.exists() else {}
            write_atomically(path, json.dumps(known | facts, indent=1) + "\n")
        except (OSError, ValueError) as error:  # the training goes on without
            self.say(f"{path} is not written: {error}")

    def log_valid(
        self, step: int, values: dict[str, float], averaged: dict[str, float] | None = None
    ) -> dict[str, float]:
        """Log the metrics of a validation, named without their prefix; return them with it.

        Args:
            step: Steps taken.
            values: Metrics of the weights.
            averaged: The same of their moving average, if there is one.
        """
        results = {"valid": values} | ({} if averaged is None else {"ema": averaged})
        metrics = {f"{k}/{name}": v for k, found in results.items() for name, v in found.items()}
        self.log(step, metrics)
        for kind, found in results.items():
            text = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            title = "validation" if kind == "valid" else "validation, EMA"
            self.say(f"{self._at(step)}  {title}: {text}")
        return metrics

    def _at(self, step: int) -> str:
        return f"step {step:{len(str(self._steps))}}/{self._steps}"

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout if in_notebook() else sys.stderr)
        elif self._world.is_main:
            say(text)

    def close(self) -> None:
        """Finish the bar and the logs."""
        if self._bar is not None:
            self._bar.close()
        self._logs.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log metrics under their full names; a full disk must not end the training."""
        if not self._world.is_main:
            return
        self._unwritten.append({"step": step, "time": round(time.time(), 3), **metrics})
        try:
            append(self._path, _lines(self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            self.say(f"step {step} is not logged yet: {error}")
        self._logs.log(step, metrics)


def _lines(contents: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(content) + "\n" for content in contents).encode()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl; a last line that was cut off by a kill is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def scalars(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line that has a metric, such as ``valid/loss``."""
    return [(line["step"], line[name]) for line in lines if name in line]


def environment(world: World, **choices: str) -> dict[str, Any]:
    """Describe the machine, the package versions and the backends that were chosen."""
    cuda, cores = world.device.type == "cuda", find_cores()
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "cuda": torch.version.cuda,
        "cores": cores.number,
        "cores_by": cores.source,
        "threads": torch.get_num_threads(),
        "waiting": describe_waiting(),
        "world_size": world.world_size,
        "launcher": world.launcher,
        **choices,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that compute; None of one that is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated by PyTorch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # getrusage counts the parent of a forked process as well, but opens no file.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
