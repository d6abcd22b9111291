"""What a run tells of itself: progress bar or lines, metrics.jsonl, TensorBoard, environment."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssast.engine.parallel.ranks import World
from ssast.pipelines.files import write_atomically

PACKAGES = ("ssast-engine", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "flash-attn")


class Monitor:
    """Times the steps of one process and, on rank 0, writes down what is logged."""

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
    ):
        """Open the run's logs at a step.

        Args:
            folder: Of the run.
            world: This process's place.
            step: Steps already taken; lines of later ones, of a run that was cut off, are removed.
            steps: Of the whole run.
            batch_size: Clips of one step, over all ranks.
            flops_per_clip: Of a training step.
            peak_flops: Of one device; None if unknown, and then rates are given instead of MFU.
        """
        self._path, self._world, self._steps = folder / "metrics.jsonl", world, steps
        self._batch_size, self._flops, self._peak = batch_size, flops_per_clip, peak_flops
        self._begin, self._waited, self._since = time.perf_counter(), 0.0, step
        self._bar: tqdm | None = None
        self._board: Any = None
        if not world.is_main:
            return
        self._open(step)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def _open(self, step: int) -> None:
        """Begin to write after a step, without what was written of later ones."""
        lines = read_metrics(self._path)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines) or step == 0:
            write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        # Imported here: it takes a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Go back to a step: the lines of later ones are removed."""
        if self._board is not None:
            self._board.close()
            self._open(step)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        self.restart_clock(step)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as time without work."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def restart_clock(self, step: int) -> None:
        """Leave the time (of a validation, say) and the steps up to here out of the rates."""
        self._begin, self._waited, self._since = time.perf_counter(), 0.0, step

    def log_train(self, step: int, values: dict[str, float]) -> None:
        """Write a line on the steps since the last one, with their rates."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        clips_per_s = (step - self._since) * self._batch_size / seconds
        flops = clips_per_s * self._flops / self._world.world_size
        rates = {
            "clips_per_s": clips_per_s,
            "gflops_per_device": flops / 1e9,
            "data_wait_share": self._waited / seconds,
            "memory_gib": peak_memory_gib(self._world.device),
        }
        if self._peak:
            rates["mfu"] = flops / self._peak
        eta_s = (self._steps - step) * seconds / max(1, step - self._since)
        self._write(step, "train", {**values, **rates})
        shown = {
            "loss": f"{values['loss']:.3f}",
            **({"acc": f"{values['accuracy']:.3f}"} if "accuracy" in values else {}),
            "lr": f"{values['lr']:.1e}",
            "clips/s": f"{clips_per_s:.1f}",
            **({"MFU": f"{flops / self._peak:.1%}"} if self._peak else {}),
            **({} if self._peak else {"GFLOP/s": f"{flops / 1e9:.0f}"}),
            "wait": f"{rates['data_wait_share']:.1%}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._world.is_main:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step}/{self._steps}  {text}  ETA {duration(eta_s)}", flush=True)
        self.restart_clock(step)

    def log_valid(self, step: int, values: dict[str, float]) -> None:
        """Write down and show a validation."""
        self._write(step, "valid", values)
        self.say(
            f"step {step}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        )

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._world.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Finish the bar and the logs."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        if self._board is None:
            return
        line = {"step": step, "split": split, "time": round(time.time(), 3), **values}
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        except OSError as error:  # a full disk: the weights are worth more than their log
            self.say(f"step {step} is not logged: {error}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a killed run left half written is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def environment(world: World, **choices: str) -> dict[str, Any]:
    """The machine, the versions and what was chosen for them."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "world_size": world.world_size,
        "launcher": world.launcher,
        **choices,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far: what PyTorch had in use on a GPU, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage's maxrss: it counts the parent of a forked process as well.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return 0.0
