"""The tables of the performance page, from the files of its measurements."""

import statistics
from dataclasses import dataclass
from typing import Any

from ssast.benchmarks.loading.report import Result
from ssast.benchmarks.performance.records import Results
from ssast.benchmarks.performance.store import Scope
from ssast.benchmarks.study.tables import table
from ssast.benchmarks.training.variants import DEFAULT, OPTIONS, VARIANTS, Variant, label
from ssast.engine.config import load_config
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.monitoring.gpus import Gpu, load_gpu
from ssast.engine.monitoring.profiling import PARTS
from ssast.engine.planning.plan import StepTime, count_parameters, step_time
from ssast.engine.planning.report import PlanRequest, make_plan

PLANNED = ("tiny_patch", "base_patch", "large")
GPUS, COUNTS = ("a100", "h100", "b200"), (1, 8, 64)


@dataclass(frozen=True)
class Row:
    """A variant of the step; medians over all steps of all its processes.

    Attributes:
        variant: Variant that was measured.
        wall_s: Wall-clock seconds.
        cpu_s: CPU seconds, over all threads.
        cpu_each: CPU seconds of each step.
        speedup: Speedup over the published step in wall-clock time.
        cpu_speedup: Speedup over the published step in CPU time.
        gflop_per_cpu_s: Throughput, with the FLOPs counted as if none were saved.
        peak: GFLOP per CPU second of a large matmul in the same processes.
        memory_gib: Highest resident memory of its processes.
        loss_difference: Relative difference of the loss to that of the published step.
    """

    variant: Variant
    wall_s: float
    cpu_s: float
    cpu_each: tuple[float, ...]
    speedup: float
    cpu_speedup: float
    gflop_per_cpu_s: float
    peak: float
    memory_gib: float
    loss_difference: float


def step_rows(record: Results, scope: Scope, size: str) -> tuple[list[Row], dict[str, str]]:
    """Return the measured variants in order, the published step first, and why others are left out.

    Empty without the published step.
    """
    results = record.read(f"step-{size}")
    samples: dict[str, list[dict[str, Any]]] = {}
    for key, sample in results.items():
        samples.setdefault(key.partition(", repeat")[0], []).append(sample)
    rows: list[Row] = []
    left_out = {name: s[0]["left_out"] for name, s in samples.items() if "left_out" in s[0]}
    for name, variant in {**VARIANTS, **OPTIONS}.items():
        if name not in samples or name in left_out or "published" not in samples:
            continue
        own = samples[name]
        wall_s, cpu_s = (
            [value for sample in own for value in sample[key]] for key in ("wall_s", "cpu_s")
        )
        wall, cpu = statistics.median(wall_s), statistics.median(cpu_s)
        config = scope.setting(size).config(two_pass=variant.num_passes == 2)
        published, loss = rows[0] if rows else None, samples["published"][0]["loss"]
        rows.append(
            Row(
                variant=variant,
                wall_s=wall,
                cpu_s=cpu,
                cpu_each=tuple(cpu_s),
                speedup=published.wall_s / wall if published else 1.0,
                cpu_speedup=published.cpu_s / cpu if published else 1.0,
                gflop_per_cpu_s=step_flops_per_clip(config) * scope.batch / 1e9 / cpu,
                peak=max(sample["peak_gflops"] for sample in own),
                memory_gib=max(sample["memory_gib"] for sample in own),
                loss_difference=abs(own[0]["loss"] / loss - 1),
            )
        )
    return rows, left_out


def describe(scope: Scope) -> str:
    """Describe what a step computes."""
    return f"{scope.frames} frames, batch {scope.batch}, {scope.threads} threads"


def default_row(rows: list[Row]) -> Row | None:
    """Return the row of what ``ssast pretrain`` does."""
    return next((row for row in rows if row.variant == DEFAULT), None)


def steps(record: Results, scope: Scope, size: str) -> list[str]:
    """Tabulate the effect of each change."""
    rows, left_out = step_rows(record, scope, size)
    if not rows:
        return []
    cells = []
    for row in rows:
        line = [
            label(row.variant),
            f"{row.wall_s:.3g}",
            f"{row.cpu_s:.3g}",
            f"{row.speedup:.2f}",
            f"{row.cpu_speedup:.2f}",
            f"{row.gflop_per_cpu_s:.0f}",
            f"{row.gflop_per_cpu_s / row.peak:.0%}",
            f"{row.memory_gib:.2f}",
            "" if row is rows[0] else f"{row.loss_difference:.0e}".replace("0e+00", "0"),
        ]
        cells.append([f"**{cell}**" if row.variant == DEFAULT and cell else cell for cell in line])
    fewest, most = (pick(len(row.cpu_each) for row in rows) for pick in (min, max))
    variation = max((max(row.cpu_each) - min(row.cpu_each)) / row.cpu_s for row in rows)
    counts = f"medians of {fewest} to {most} steps, whose CPU seconds vary by up to {variation:.0%}"
    counts = record.note or (counts if most > 1 else "one step of each")
    lines = [f"### {size}", ""]
    lines += table(
        ["", "s", "CPU s", "speedup", "speedup in CPU s", "GFLOP per CPU s", "of peak", "GiB",
         "relative difference of loss"],
        cells,
    )  # fmt: skip
    lines += [f"{describe(scope)}; {counts}.", ""]
    known = {**VARIANTS, **OPTIONS}
    lines += [f"- left out: {known[name].title}: {why}" for name, why in left_out.items()]
    return [*lines, ""] if left_out else lines


def loaders(record: Results) -> list[str]:
    """Tabulate the audio stream against the plain loader."""
    results = [Result(**found) for found in record.read("loader").values()]
    rows = []
    for r in results:
        stages = r.stages("files")
        rows.append(
            [
                f"{r.kind}, {r.seconds:g} s",
                f"{1e3 / r.cpu_ms['soundfile']:.0f}",
                f"{1e3 / r.cpu_ms['files']:.0f}",
                f"{r.ratio('files'):.2f}",
                f"{r.ratio('files decode'):.2f}",
                *(f"{ms:.2f}" for ms in stages.values()),
                f"{r.max_difference:.0e}",
            ]
        )
    header = ["clips", "plain", "stream", "speedup", "speedup of decoding"]
    header += ["read ms", "decode ms", "filterbank ms", "max difference of log-mel"]
    return table(header, rows) if rows else []


def runs(record: Results) -> list[str]:
    """Tabulate short runs on files."""
    rows = [
        [
            f"{name}: `{run['command']}`",
            f"{run['clip_s']:.1f}",
            f"{run['clips_per_s']:.1f}",
            f"{run['data_wait_share']:.1%}",
            f"{run['clips_per_s_alone']:.1f}",
            f"{run['clips_per_s'] / run['clips_per_s_alone']:.0%}",
        ]
        for name, run in record.read("runs").items()
    ]
    header = ["run", "s per clip", "clips/s", "waiting for data"]
    header += ["step alone, clips/s", "of step alone"]
    return table(header, rows) if rows else []


def peaks(record: Results) -> list[str]:
    """Tabulate the peaks of the machine."""
    rows = [
        [name, f"{peak['gflop_per_s']:.0f}", f"{peak['gb_per_s']:.0f}"]
        for name, peak in _peaks(record).items()
    ]
    return table(["", "matmul, GFLOP/s", "copy, GB/s"], rows) if rows else []


def _peaks(record: Results) -> dict[str, dict[str, float]]:
    return {
        key.removeprefix("peak "): peak
        for key, peak in record.read("roofline").items()
        if key.startswith("peak ") and "left_out" not in peak
    }


def floor(record: Results, scope: Scope, size: str) -> StepTime | None:
    """Return the least time of the default step: its parts in sequence, each at the peak."""
    found = _peaks(record)
    peak = found.get("fp32 by AVX-512", found.get("fp32"))
    if peak is None:
        return None
    config = DEFAULT.config(scope.setting(size))
    whole: dict[str, Any] = dict.fromkeys(("gemm_share", "attention_share", "bandwidth_share"), 1.0)
    gpu = Gpu(
        name="cpu",
        precision="fp32",
        peak_tflops=peak["gflop_per_s"] / 1e3,
        bandwidth_gb_s=max(p["gb_per_s"] for p in found.values()),
        memory_gib=0.0,
        half_width=0.0,
        launch_us=0.0,
        **whole,
    )
    shape = {"world_size": 1, "batch": scope.batch, "stage": 1}
    return step_time(config, gpu, count_parameters(config), **shape)


def rooflines(record: Results, scope: Scope) -> list[str]:
    """Tabulate the default step of each size against the least time on this machine."""
    rows = []
    for size in scope.sizes:
        row, least = default_row(step_rows(record, scope, size)[0]), floor(record, scope, size)
        if row is not None and least is not None:
            parts = (least.matmul, least.attention, least.elementwise, least.optimizer)
            rows.append(
                [
                    size,
                    *(f"{seconds:.3g}" for seconds in (*parts, least.device, row.wall_s)),
                    f"{least.device / row.wall_s:.0%}",
                ]
            )
    header = ["", "matmul s", "attention s", "elementwise s", "optimizer s", "sum s"]
    return table([*header, "measured s", "of the roofline"], rows) if rows else []


def profiles(record: Results, scope: Scope) -> dict[str, dict[str, float]]:
    """Return the shares of the parts of a step, by size, without parts that take no time."""
    results = record.read("roofline")
    found = {
        size: results[f"profile {size}"] for size in scope.sizes if f"profile {size}" in results
    }
    return {
        size: {
            part: ms / profile["step_ms"]
            for part, ms in profile["parts_ms"].items()
            if any(other["parts_ms"][part] > 1e-3 * other["step_ms"] for other in found.values())
        }
        for size, profile in found.items()
    }


def where_time_goes(record: Results, scope: Scope) -> list[str]:
    """Tabulate the parts of a step."""
    found = profiles(record, scope)
    if not found:
        return []
    parts = next(iter(found.values()))
    rows = [[PARTS[part], *(f"{found[size][part]:.1%}" for size in found)] for part in parts]
    return table(["", *found], rows)


def scaling(record: Results, scope: Scope) -> list[str]:
    """Tabulate the throughput of the default step of tiny, and of each size."""
    results = record.read("scaling")
    whole = results.get(f"batch {scope.batch}")
    rows = [
        [
            key,
            f"{found['clips_per_s']:.1f}",
            f"{found['clips_per_s'] / whole['clips_per_s']:.2f}" if whole else "",
            f"{found['memory_gib']:.2f}",
        ]
        for key, found in results.items()
    ]
    for size, found in sizes(record, scope).items():
        rows.append([f"size {size}", f"{found[0]:.2f}", "", f"{found[1]:.2f}"])
    header = ["", "clips/s", f"of batch {scope.batch}", "GiB"]
    return table(header, rows) if rows else []


def rates(record: Results, scope: Scope) -> dict[str, dict[str, float]]:
    """Return clips per second by what was varied and its value."""
    found: dict[str, dict[str, float]] = {}
    for key, result in record.read("scaling").items():
        what, value = key.split(" ")
        if what in ("threads", "processes"):
            unit = what.removesuffix("es" if what == "processes" else "s")
            what, value = "threads, or processes", f"{value} {unit if value == '1' else what}"
        found.setdefault(what, {})[value] = result["clips_per_s"]
    by_size = {size: rate for size, (rate, _) in sizes(record, scope).items()}
    return found | ({"size": by_size} if by_size else {})


def sizes(record: Results, scope: Scope) -> dict[str, tuple[float, float]]:
    """Return clips per second and GiB of the default step of each size."""
    rows = {size: default_row(step_rows(record, scope, size)[0]) for size in scope.sizes}
    return {s: (scope.batch / r.wall_s, r.memory_gib) for s, r in rows.items() if r is not None}


def plans() -> list[str]:
    """Tabulate the plans for GPUs, with the batch per GPU that is best on the largest number."""
    rows = []
    for recipe in PLANNED:
        config = load_config(recipe)
        for name in GPUS:
            gpu = load_gpu(name)
            most = make_plan(config, PlanRequest(max(COUNTS), gpu))["choice"]
            batch = most["batch_per_gpu"]
            found = [make_plan(config, PlanRequest(count, gpu, batch)) for count in COUNTS]
            first, last = found[0], found[-1]
            rows.append(
                [
                    f"{config.model.size}, {name}",
                    *(f"{plan['clips_per_s']:,.0f}" for plan in found),
                    f"{first['mfu']:.0%}",
                    f"{last['mfu']:.0%}",
                    str(batch),
                    str(last["choice"]["train.zero_stage"]),
                    f"{first['memory_per_gpu']:.1f}",
                ]
            )
    rates = [f"{count} GPU{'s' * (count > 1)}" for count in COUNTS]
    header = ["predicted clips/s of", *rates, f"MFU, {rates[0]}", f"MFU, {rates[-1]}"]
    return table([*header, "clips per GPU", "ZeRO", "GiB per GPU"], rows)
