"""Test and measure everything on a machine with a GPU, and write docs/gpu.md.

Environment, tests, kernels, steps against the ledger, the loader, short runs, a profile, and
several GPUs where there are some. A part that fails is reported, and the next one is run. What is
done is kept: the same command goes on. With --device cpu a small dry run of the same commands.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ssast.benchmarks.device import find_device
from ssast.benchmarks.gpu.page import write_page
from ssast.benchmarks.gpu.parts import Part, parts
from ssast.benchmarks.loading.data import write_clips
from ssast.engine.errors import ConfigError
from ssast.pipelines.files import write_atomically

OUT, DOCS = Path("runs/gpu"), Path("docs")
RESULTS = "parts.json"
BUDGET_S = 25 * 60.0
CLIPS = {"cuda": (512, 10.0), "cpu": (12, 1.0)}  # generated to train on: number and seconds
STOP_S = 10.0  # between the two signals to a part that takes too long


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are not done yet, then write the page.

    Args:
        arguments: Command-line arguments without the program's name; None: those of the process.

    Returns:
        0, or 1 if a part failed.

    Raises:
        ConfigError: Wrong options, or no GPU.
    """
    options = _parser().parse_args(arguments)
    device = find_device(options.device).type
    if options.device == "auto" and device == "cpu":
        raise ConfigError("this machine shows no GPU: make gpu DEVICE=cpu is a dry run")
    out = options.out or OUT / device
    out.mkdir(parents=True, exist_ok=True)
    data = options.data or _make_clips(out / "clips", device)
    wanted = parts(device, torch.cuda.device_count() if device == "cuda" else 0, out, data)
    names = [part.name for part in wanted]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: expected some of {names}")
    results, begun = _read(out / RESULTS), time.monotonic()
    for part in wanted:
        if options.only and part.name not in options.only:
            continue
        if results.get(part.name, {}).get("status") == 0:
            continue
        left = options.budget_s - (time.monotonic() - begun)
        results[part.name] = _run(part, out, left)
        write_atomically(out / RESULTS, json.dumps(results, indent=1) + "\n")
    docs = options.docs or (DOCS if device == "cuda" else out)
    print(write_page(out, docs, [part for part in wanted if part.name in results], results))
    return int(any(found["status"] != 0 for found in results.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ssast bench gpu", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: a small dry run")
    add("--data", type=Path, help="clips to train on (default: noise that is generated)")
    add("--only", nargs="+", metavar="PART", help="run these parts alone")
    add("--budget-s", type=float, default=BUDGET_S, help="seconds in all (%(default)g)")
    add("--out", type=Path, help=f"folder of the results ({OUT}/DEVICE)")
    add("--docs", type=Path, help=f"folder of the page ({DOCS}; of a dry run --out)")
    return parser


def _make_clips(folder: Path, device: str) -> Path:
    number, seconds = CLIPS[device]
    if not folder.is_dir():
        folder.mkdir()
        write_clips(folder, number, seconds=seconds)
    return folder


def _read(path: Path) -> dict[str, dict[str, float | str]]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged, delete it: {error}") from error


def _run(part: Part, out: Path, left_s: float) -> dict[str, float | str]:
    """Run a part; return its status, or why there is none, and its seconds."""
    if left_s <= 0:
        print(f"{part.name}: left out, the time is over", flush=True)
        return {"status": "left out, the time is over", "seconds": 0.0}
    limit_s, begun = min(part.limit_s, left_s), time.monotonic()
    print(f"{part.name}: {' '.join(part.command[1:])}", flush=True)
    with (out / f"{part.name}.txt").open("wb") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            _end(process)
    seconds = time.monotonic() - begun
    print(f"{part.name}: {'done' if status == 0 else status} in {seconds:.0f} s", flush=True)
    return {"status": status, "seconds": round(seconds, 1)}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a part with all of its processes, also those that it left behind."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
