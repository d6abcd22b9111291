"""The device of a benchmark, and its clock."""

import argparse
import os
import time
from collections.abc import Callable

import torch

from ssast.engine.errors import ConfigError

CPU = torch.device("cpu")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` to the options of a benchmark."""
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="what computes (default auto: a GPU where there is one)",
    )


def find_device(name: str) -> torch.device:
    """Return the device of ``--device``; of several GPUs the first.

    Raises:
        ConfigError: It is "cuda", and there is no GPU.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError("--device cuda: this machine shows no GPU, expected one")
    return torch.device("cuda", 0) if found and name != "cpu" else CPU


def use_device(device: torch.device) -> None:
    """Make a GPU the current one, or hide all from this process, which has not used any."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def timed(
    call: Callable[[], object], device: torch.device = CPU, count: int = 1
) -> tuple[float, float]:
    """Return the CPU seconds (of all threads) and wall-clock seconds of a call.

    On a GPU, which has nothing else to do at the start, the time between two CUDA events.

    Args:
        call: What is timed.
        device: What computes in it.
        count: Calls, one after the other, of which the mean is returned.
    """
    if device.type != "cuda":
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for _ in range(count):
            call()
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        return cpu_s / count, wall_s / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    cpu_s = time.process_time()
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return (time.process_time() - cpu_s) / count, begin.elapsed_time(end) / 1e3 / count
