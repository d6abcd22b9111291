"""Time each operation of a training step against plain PyTorch and the roofline.

Each result is checked against the reference in float64 before it is timed. On a CPU the providers
alternate, so that other load on the machine disturbs all alike; on a GPU each is timed by itself.
The roofline is that of this machine: a large copy and a large matmul, measured in the same run.

With --aot nothing is timed: the kernels are compiled for sm_80, sm_90 and sm_100, which needs no
GPU, and their registers, spills, shared memory and instructions are shown.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.profiler import ProfilerActivity, profile

from ssast.benchmarks.device import add_device_option, find_device
from ssast.benchmarks.operations.problems import (
    PROBLEMS,
    Outputs,
    Problem,
    Shape,
    problems,
    size_name,
)
from ssast.benchmarks.operations.report import (
    Compiled,
    Peaks,
    Timing,
    aot_markdown,
    aot_summary,
    plot,
    timing_markdown,
)
from ssast.engine.monitoring.monitor import environment
from ssast.engine.parallel.ranks import World
from ssast.engine.settings import SIZES
from ssast.kernels.aot import ARCHITECTURES, compile_all, record
from ssast.kernels.launch import assume_architecture
from ssast.kernels.matmul import fast_matmul
from ssast.kernels.roofline import Work
from ssast.pipelines.text import one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.int64: "int64"}
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.int64: 0.0}


class WrongResult(RuntimeError):
    """An operation does not agree with its reference."""


def _run(provide: Callable[..., Outputs], leaves: list[Tensor], *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            provide(*leaves)
        return
    outputs = _differentiable(provide(*leaves))
    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)


def _differentiable(outputs: Outputs) -> list[Tensor]:
    every = [outputs] if isinstance(outputs, Tensor) else outputs
    return [output for output in every if output.requires_grad]


def check(problem: Problem) -> None:
    """Compare "ours" with the reference in float64, values and gradients.

    Raises:
        WrongResult: They differ by more than rounding in this dtype.
    """
    if not problem.comparable:
        return

    def values(provider: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in problem.leaves]
        out = problem.providers[provider](*leaves)
        if not leaves:
            return [out] if isinstance(out, Tensor) else list(out)
        outputs = _differentiable(out)
        total = torch.stack([output.double().sum() for output in outputs]).sum()
        return [*torch.autograd.grad(total, leaves), *(output.detach() for output in outputs)]

    exact = values("eager", torch.float64)
    for place, (got, want) in enumerate(zip(values("ours", problem.dtype), exact, strict=True)):
        error = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
        if not error <= MAX_ERROR[problem.dtype]:
            leaves = len(problem.leaves)
            what = f"gradient {place + 1}" if place < leaves else "result"
            raise WrongResult(
                f"{problem.operation} in {NAMES[problem.dtype]}: {what} is off by {error:.1e}"
            )


Calls = dict[str, Callable[[], Any]]


def _clock(calls: Calls, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return median, 20th and 80th percentile of each call, in seconds."""
    quantiles = [0.5, 0.2, 0.8]
    if device.type == "cuda":
        return {
            name: [1e-3 * ms for ms in triton.testing.do_bench(call, quantiles=quantiles)]
            for name, call in calls.items()
        }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    levels = torch.tensor(quantiles, dtype=torch.float64)
    return {
        name: torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
        for name, values in seconds.items()
    }


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak memory of a call, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure_peaks(dtypes: Sequence[torch.dtype], device: torch.device, repeats: int) -> Peaks:
    """Measure the peaks of this machine."""
    side, cells = (8192, 1 << 29) if device.type == "cuda" else (2048, 1 << 25)
    source = torch.ones(cells, device=device)
    target = torch.empty_like(source)
    copy = _clock({"copy": partial(target.copy_, source)}, repeats, device)["copy"][0]
    flops = {}
    for dtype in dtypes:
        a = torch.ones(side, side, device=device, dtype=dtype)
        seconds = _clock({"mm": partial(torch.mm, a, a)}, repeats, device)["mm"][0]
        flops[dtype] = 2 * side**3 / seconds
    return Peaks(2 * 4 * cells / copy, flops)


def time_problem(
    problem: Problem,
    shape: Shape,
    peaks: Peaks,
    *,
    repeats: int,
    compiled: bool,
    device: torch.device,
) -> Iterator[Timing]:
    """Time all providers, forward and, where there are gradients, forward with backward."""
    providers = dict(problem.providers)
    leaves = [x.detach().requires_grad_() for x in problem.leaves]
    if compiled and problem.comparable:
        torch._dynamo.reset()
        fused = torch.compile(providers["eager"], dynamic=False)
        try:
            _run(fused, leaves, backward=False)
            providers["torch.compile"] = fused
        except TorchDynamoException as error:
            reason = f"torch.compile is left out: {one_line(error):.200}"
            print(f"{problem.operation}: {reason}", file=sys.stderr)
    phases: list[tuple[str, Work]] = [("forward", problem.forward)]
    if problem.backward is not None:
        both = (a + b for a, b in zip(problem.forward, problem.backward, strict=True))
        phases.append(("forward+backward", Work(*both)))
    dtype = torch.float32 if problem.dtype == torch.int64 else problem.dtype
    for phase, work in phases:
        backward = phase != "forward"
        calls: Calls = {
            name: partial(_run, provide, leaves, backward=backward)
            for name, provide in providers.items()
        }
        for name, (median, p20, p80) in _clock(calls, repeats, device).items():
            yield Timing(
                problem.operation,
                name,
                phase,
                size_name(problem.operation, shape),
                shape.batch,
                NAMES[problem.dtype],
                median,
                p20,
                p80,
                work.bytes / median / 1e9,
                work.flops / median / 1e12,
                work.seconds(peaks.bytes_per_s, peaks.flops_per_s[dtype]) / median,
                peak_bytes(calls[name], device) / 2**20,
            )


def compile_kernels(
    operations: Sequence[str], sizes: Sequence[str], dtypes: Sequence[torch.dtype], batch: int = 32
) -> list[Compiled]:
    """Compile every Triton kernel at the shapes of these sizes for all architectures."""
    found = []
    for shape, problem in problems(operations, sizes, [batch], dtypes, torch.device("meta")):
        for arch in ARCHITECTURES:
            with assume_architecture(arch):
                found += [
                    (shape, problem, variant, launch, arch)
                    for variant, operation, args in problem.kernels
                    for launch in record(operation, *args)
                ]
    reports = compile_all((launch, arch) for *_, launch, arch in found)
    return [
        Compiled(
            problem.operation,
            report.kernel,
            variant,
            NAMES[problem.dtype],
            size_name(problem.operation, shape),
            report,
        )
        for (shape, problem, variant, *_), report in zip(found, reports, strict=True)
    ]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions and the commit for a report."""
    facts = environment(World(0, 0, 1, "single", device))
    folder = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    versions = {name: facts["packages"][name] for name in ("torch", "triton", "flash-attn")}
    return {
        "device": facts["device"],
        "cuda": facts["cuda"],
        "cores": facts["cores"],
        "threads": facts["threads"],
        **versions,
        "commit": found.stdout.strip() if found.returncode == 0 else None,
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; print a table and write it, with the numbers, to a folder.

    Args:
        argv: Command-line arguments without the program's name; None: those of the process.

    Returns:
        The exit status: 0, or 1 where a result is wrong.
    """
    parser = argparse.ArgumentParser(prog="ssast bench kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--aot", action="store_true", help="compile for absent GPUs; time nothing")
    parser.add_argument("--smoke", action="store_true", help="the smallest problems, in seconds")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder (default bench)")
    parser.add_argument("--operations", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=list(SIZES),
        help="(default tiny to large, with --aot base and large)",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="clips (default 8, on a GPU 32 128)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="(default fp32, on a GPU both)"
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="measured calls of each on a CPU (default 10)"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: all cores)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.repeats < 2 or min(args.batches or [1]) < 1:
        parser.error("needs at least 2 repeats and 1 clip")
    device = find_device(args.device)
    cuda = device.type == "cuda"
    sizes = args.sizes or (["base", "large"] if args.aot else ["tiny", "small", "base", "large"])
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs every start and stop
    args.out.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(device)

    if args.aot:
        dtypes = [DTYPES[name] for name in args.dtypes or DTYPES]
        compiled = compile_kernels(args.operations, sizes, dtypes)
        versions = {"torch": facts["torch"], "triton": facts["triton"], "commit": facts["commit"]}
        _write_lines(args.out / "aot.jsonl", [{**c.row(), **versions} for c in compiled])
        table = aot_markdown(compiled)
        (args.out / "aot.md").write_text(f"{table}\n{aot_summary(compiled)}")
        print(table)
        print(f"written: {args.out / 'aot.jsonl'}, {args.out / 'aot.md'}")
        return 0

    dtypes = [DTYPES[name] for name in args.dtypes or (["fp32", "bf16"] if cuda else ["fp32"])]
    batches, frames = args.batches or ([32, 128] if cuda else [8]), 1024
    if args.smoke:
        sizes, batches, frames, args.repeats = sizes[:1], [2], 128, 2
    torch.manual_seed(0)
    timings: list[Timing] = []
    try:
        with fast_matmul():  # as in training, and the peak with it
            peaks = measure_peaks(dtypes, device, args.repeats)
            every = problems(args.operations, sizes, batches, dtypes, device, frames)
            for shape, problem in every:
                check(problem)
                timings += time_problem(
                    problem,
                    shape,
                    peaks,
                    repeats=args.repeats,
                    compiled=not args.no_compile,
                    device=device,
                )
                what = f"{problem.operation} {shape.size} batch {shape.batch}"
                print(f"{what}: done", file=sys.stderr, flush=True)
    except WrongResult as error:
        print(f"ssast bench kernels: {error}; nothing was timed after that", file=sys.stderr)
        return 1
    _write_lines(args.out / "kernels.jsonl", [{**asdict(t), **facts} for t in timings])
    table = timing_markdown(timings, facts, peaks)
    (args.out / "kernels.md").write_text(table)
    plot(timings, facts, args.out / "kernels.png")
    print(table)
    print(
        f"written: {', '.join(str(args.out / f'kernels.{end}') for end in ('jsonl', 'md', 'png'))}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
