"""Tables and plots of the kernel benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssast.kernels.aot import Report
from ssast.pipelines.figures import save_figure, subplots


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, with padded columns so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def aot_markdown(compiled: "Sequence[Compiled]") -> str:
    """Tabulate each kernel, dtype, size and architecture in a line of its own."""
    header = (
        "kernel", "variant", "dtype", "size", "arch", "registers", "spills B", "shared KiB",
        "CTAs/SM", "tensor core", "128-bit loads", "atomics",
    )  # fmt: skip
    rows = [
        (
            c.kernel,
            c.variant,
            c.dtype,
            c.size,
            c.report.arch,
            str(c.report.registers),
            str(c.report.spill_bytes),
            f"{c.report.shared_bytes / 1024:.1f}",
            str(c.report.ctas_per_sm),
            str(c.report.tensor_core_ops),
            f"{c.report.load128} of {c.report.loads}",
            str(c.report.atomics),
        )
        for c in compiled
    ]
    return _table(header, rows) + "\n"


def aot_summary(compiled: "Sequence[Compiled]") -> str:
    """Tabulate each kernel, dtype and size in a line, with a column per architecture."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for c in compiled:
        name = f"{c.kernel} {c.variant}".strip()
        r = c.report
        cells.setdefault((name, c.dtype, c.size), {})[r.arch] = (
            f"{r.registers} / {r.shared_bytes / 1024:.0f} / {r.ctas_per_sm} / {r.tensor_core_ops}"
        )
    architectures = list(dict.fromkeys(c.report.arch for c in compiled))
    rows = [(*key, *(row[arch] for arch in architectures)) for key, row in cells.items()]
    return _table(("kernel", "dtype", "size", *architectures), rows) + "\n"


def timing_markdown(timings: "Sequence[Timing]", facts: dict[str, Any], peaks: "Peaks") -> str:
    """Tabulate each provider at each problem."""
    header = (
        "operation", "size", "batch", "dtype", "phase", "provider", "median ms", "p20 to p80",
        "speedup", "GB/s", "GFLOP/s", "roofline", "peak MiB",
    )  # fmt: skip
    eager = {_problem(t): t.median_s for t in timings if t.provider == "eager"}
    rows = [
        (
            t.operation,
            t.size,
            str(t.batch),
            t.dtype,
            t.phase,
            t.provider,
            f"{1e3 * t.median_s:.3g}",
            f"{1e3 * t.p20_s:.3g} to {1e3 * t.p80_s:.3g}",
            f"{eager[_problem(t)] / t.median_s:.2f}",
            f"{t.gb_per_s:.1f}",
            f"{1e3 * t.tflop_per_s:.0f}" if t.tflop_per_s else "",
            f"{t.roofline:.0%}",
            f"{t.peak_mib:.1f}",
        )
        for t in timings
    ]
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
        for dtype, rate in peaks.flops_per_s.items()
    )
    machine = (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, triton "
        f"{facts['triton']}, commit {facts['commit']}; measured peaks: "
        f"{peaks.bytes_per_s / 1e9:.0f} GB/s, {rates}"
    )
    return f"{_table(header, rows)}\n\n{machine}\n"


def _problem(timing: "Timing") -> tuple[Any, ...]:
    return timing.operation, timing.size, timing.batch, timing.dtype, timing.phase


def plot(timings: "Sequence[Timing]", facts: dict[str, Any], path: Path) -> None:
    """Plot the time of each provider relative to eager; shorter is better."""
    problems = list(dict.fromkeys(map(_problem, timings)))
    providers = list(dict.fromkeys(t.provider for t in timings if t.provider != "eager"))
    eager = {_problem(t): t.median_s for t in timings if t.provider == "eager"}
    height = 0.8 / len(providers)
    figure, axes = subplots(figsize=(9, 1.2 + 0.36 * len(problems)))
    for i, provider in enumerate(providers):
        own = [t for t in timings if t.provider == provider]
        places = [problems.index(_problem(t)) + (i + 0.5) * height - 0.4 for t in own]
        shares = [t.median_s / eager[_problem(t)] for t in own]
        error_bars = [
            [(t.median_s - t.p20_s) / eager[_problem(t)] for t in own],
            [(t.p80_s - t.median_s) / eager[_problem(t)] for t in own],
        ]
        axes.barh(places, shares, height, xerr=error_bars, label=provider, error_kw={"lw": 0.8})
        for place, t in zip(places, own, strict=True):
            end = t.p80_s / eager[_problem(t)]
            axes.text(end, place, f"  {1e3 * t.median_s:.3g} ms", va="center", fontsize=7)
    axes.axvline(1, color="black", lw=0.8, ls="--")
    labels = [f"{o}, {s}, {b} clips, {d}, {p}" for o, s, b, d, p in problems]
    axes.set_yticks(range(len(problems)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(t.p80_s / eager[_problem(t)] for t in timings))
    axes.set_xlabel("time relative to eager PyTorch (dashed); median, 20th to 80th percentile")
    axes.set_title(f"{facts['device']}, torch {facts['torch']}", fontsize=10)
    axes.legend(loc="lower right")
    save_figure(figure, path, dpi=120)


@dataclass(frozen=True)
class Peaks:
    """Throughput of a large copy and of a large matmul on this device."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]


@dataclass(frozen=True)
class Timing:
    """Time of one provider at one problem, in seconds per call.

    ``roofline`` is the least time on this device as a share of the median; see kernels/roofline.
    """

    operation: str
    provider: str
    phase: str  # "forward" or "forward+backward"
    size: str
    batch: int
    dtype: str
    median_s: float
    p20_s: float
    p80_s: float
    gb_per_s: float
    tflop_per_s: float
    roofline: float
    peak_mib: float


@dataclass(frozen=True)
class Compiled:
    """One kernel of an operation at a shape, compiled for an architecture."""

    operation: str
    kernel: str
    variant: str  # of the operation, where it has several
    dtype: str
    size: str
    report: Report

    def row(self) -> dict[str, Any]:
        """Flatten it for a line of JSON."""
        own = asdict(self)
        report = own.pop("report")
        return {**own, **report}
