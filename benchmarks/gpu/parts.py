"""The parts of ``ssast bench gpu``: commands that measure and test, each with a time limit."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SSAST = (sys.executable, "-m", "ssast.engine.cli")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
BATCHES = {"tiny": 256, "base": 64}  # clips of a micro-batch on a GPU, by size of the model
VALIDATED = ("train.validate_every=60",)
SMALL = ("model.depth=1", "audio.num_frames=64", "train.batch_size=4")  # of a dry run


@dataclass(frozen=True)
class Part:
    """A command of the session.

    Attributes:
        name: Name, of its file too.
        title: What it answers, a heading of the page.
        command: Program and arguments.
        limit_s: Seconds after which it is stopped.
        folder: Run folder whose pictures are shown, if it is a run.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit_s: float
    folder: Path | None = None


def parts(device: str, num_gpus: int, out: Path, data: Path) -> list[Part]:
    """Return the parts of a session, in their order; on the CPU all of them small.

    Args:
        device: ``cuda``, or ``cpu`` for a dry run.
        num_gpus: GPUs of the machine.
        out: Folder of the session.
        data: Clips to train on: a folder or a manifest.
    """
    on_gpu = device == "cuda"
    found = [
        Part("environment", "The machine", (*SSAST, "env"), 120),
        _tests(device),
        _kernels(on_gpu, out),
        *_steps(device),
        _loader(device),
        *_runs(on_gpu, out, data),
    ]
    return found + (_scaling(num_gpus, out, data) if num_gpus > 1 else [])


def _tests(device: str) -> Part:
    where = () if device == "cuda" else ("tests/kernels/test_roofline.py",)
    command = (*PYTEST, "--device", device, *where)
    return Part("tests", "Do the tests pass on the device?", command, 420)


def _kernels(on_gpu: bool, out: Path) -> Part:
    size = () if on_gpu else ("--smoke", "--no-compile", "--operations", "draw_masks", "mse")
    sizes = ("--sizes", "base", "--batches", "64") if on_gpu else ()
    command = (*SSAST, "bench", "kernels", "--out", str(out / "kernels"), *size, *sizes)
    return Part("kernels", "How fast is each operation?", command, 240)


def _steps(device: str) -> list[Part]:
    sizes = BATCHES if device == "cuda" else {"tiny": 2}
    small = () if device == "cuda" else ("--frames", "64", "--repeats", "2", "--threads", "1")
    return [
        Part(
            f"step-{size}",
            f"How fast is a step of {size} with {batch} clips, and where does its time go?",
            (
                *(*SSAST, "bench", "step", "--device", device),
                *("--sizes", size, "--batch", str(batch), "--groups", *small),
            ),
            180,
        )
        for size, batch in sizes.items()
    ]


def _loader(device: str) -> Part:
    small = () if device == "cuda" else ("--clips", "4", "--rounds", "1", "--threads", "1")
    command = (*SSAST, "bench", "data", "--device", device, *small)
    return Part("data", "How fast is the loader?", command, 180)


def _runs(on_gpu: bool, out: Path, data: Path) -> list[Part]:
    """Return short real runs: the demo's, throughput recipes, and one that is profiled."""
    runs = {
        "demo": ("demo", ("train.steps=200", "train.validate_every=100")),
        **{
            size: (f"{size}_throughput", (*_batch(size), "train.steps=60", *VALIDATED))
            for size in BATCHES
        },
        "profile": (
            "base_patch",
            (
                f"train.batch_size={BATCHES['base']}",
                "train.steps=20",
                "profile.steps=5",
                *VALIDATED,
            ),
        ),
    }
    if not on_gpu:
        few = ("train.steps=4", "train.validate_every=4", *SMALL)
        runs = {"demo": ("demo", (*few, "objective.num_masked=8", "profile.steps=1"))}
    return [
        _run(f"run-{name}", f"A run: {name}", recipe, changes, out, data)
        for name, (recipe, changes) in runs.items()
    ]


def _run(name: str, title: str, recipe: str, changes: Sequence[str], out: Path, data: Path) -> Part:
    folder = out / name
    command = (*SSAST, "pretrain", recipe, f"data.train={data}", f"run.folder={folder}")
    every = () if any(c.startswith("train.log_every") for c in changes) else ("train.log_every=2",)
    return Part(name, title, (*command, *every, *changes), 240, folder)


def _batch(size: str, num_gpus: int = 1) -> tuple[str, ...]:
    return (f"train.batch_size={BATCHES[size] * num_gpus}",)


def _scaling(num_gpus: int, out: Path, data: Path) -> list[Part]:
    """Return runs on 2, 4, 8 GPUs, at ZeRO stages 1 and 3."""
    counts = [n for n in (2, 4, 8) if n <= num_gpus]
    found = []
    for count, stage in [*((n, 1) for n in counts), (counts[-1], 3)]:
        name = f"scaling-{count}-zero{stage}"
        alone = _run(
            name,
            f"{count} GPUs, ZeRO stage {stage}",
            "base_throughput",
            (
                *_batch("base", count),
                f"train.zero_stage={stage}",
                "train.steps=40",
                *VALIDATED,
            ),
            out,
            data,
        )
        launch = (*TORCHRUN, str(count), *alone.command[1:])
        found.append(Part(alone.name, alone.title, launch, 240, alone.folder))
    return found
