"""A plan as numbers, as text and as a plot of its scaling."""

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssast.engine.config import Config
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring.flops import step_flops_per_clip
from ssast.engine.monitoring.gpus import Gpu
from ssast.engine.planning.activations import element_bytes, reduced_bytes
from ssast.engine.planning.advice import advise
from ssast.engine.planning.plan import (
    GIB,
    HIDDEN,
    HOP_S,
    LIVE_ELEMENTS,
    Choice,
    Parameters,
    bus_bandwidth,
    choose,
    count_parameters,
    largest_batch,
    memory,
    step_time,
    uses_graphs,
    wire_elements,
)
from ssast.pipelines.figures import save_figure, subplots
from ssast.pipelines.prepare.pack import FLAC_SHARE

# Of `ssast bench data --threads 1`, 10 s FLAC, on a Xeon with AVX-512; see --loader.
CLIPS_PER_CORE = {"decoded": 600.0, "filterbank": 300.0}
FEW_STEPS = 10_000
SMALL_GAIN = 0.02  # not worth naming
SCALES = [2**k for k in range(13)]  # 1 to 4096
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned.

    Attributes:
        gpus: Number of devices.
        gpu: Their kind.
        batch: Clips of one device in one micro-batch; the configuration's or a good one if None.
        clips: Clips to train on in all, with repetitions; the configuration's if None.
        price: Price of a device for an hour, in any currency.
        clips_per_core: Clips per second that a core of the host loads; a default if None.
    """

    gpus: int
    gpu: Gpu
    batch: int | None = None
    clips: float | None = None
    price: float | None = None
    clips_per_core: float | None = None


def make_plan(config: Config, request: PlanRequest) -> dict[str, Any]:
    """Make a plan, ready for JSON; bytes in GiB, times in seconds unless the name says otherwise.

    Raises:
        ConfigError: Not even one clip fits on a device.
    """
    gpu, W, train = request.gpu, request.gpus, config.train
    parameters = count_parameters(config)
    batch, batch_reasons = request.batch, list[str]()
    parts = W * train.accumulation_steps
    if batch is None and train.batch_size % parts == 0:
        batch = train.batch_size // parts
        batch_reasons.append(f"{batch} clips a device, as train.batch_size={train.batch_size} says")
    elif batch is None:
        batch_reasons.append(
            f"train.batch_size={train.batch_size} cannot be divided over {W} devices: another is "
            "planned with, which trains differently (adapt optim.lr)"
        )
    found = choose(config, gpu, parameters, W, batch)
    if found is None:
        raise ConfigError(
            f"{batch or 1} clips do not fit into {gpu.memory_gib:g} GiB of {gpu.name}, however "
            "sharded and recomputed: take fewer clips, more train.accumulation_steps or a smaller "
            "model"
        )
    choice, reasons = found
    facts = _facts(config, gpu, parameters, W, choice)
    time = step_time(
        config,
        gpu,
        parameters,
        world_size=W,
        batch=choice.batch,
        stage=choice.stage,
        every=choice.every,
    )
    advice = advise(config, gpu, parameters, W, choice)
    if advice is not None:
        reasons.append(str(advice))
    if train.compile is not True and not gpu.is_cpu:
        compiled = replace(config, train=replace(train, compile=True))
        rate = _facts(compiled, gpu, parameters, W, choice)["clips_per_s"]
        gain = rate / facts["clips_per_s"] - 1
        if gain > SMALL_GAIN:
            reasons.append(
                f"train.compile=true would be {gain:.0%} faster after minutes of compiling"
            )
    clips = request.clips
    if clips is None and config.finetune is None:  # it goes by epochs
        clips = float(train.steps) * train.batch_size
    global_batch = choice.batch * parts
    if clips is not None and train.batch_size < global_batch and clips < FEW_STEPS * global_batch:
        reasons.append(
            f"only {math.ceil(clips / global_batch):,} steps: batches of {global_batch:,} clips "
            "learn less from each clip, so train on more of them, or on fewer devices"
        )
    per_core = request.clips_per_core or CLIPS_PER_CORE["filterbank" if gpu.is_cpu else "decoded"]
    seconds = config.audio.num_frames / 100
    bytes_per_s = 2 * config.audio.sample_rate_hz * FLAC_SHARE
    reduced, gathered = 0.0, 0.0
    if W > 1:
        reduced, gathered = wire_elements(parameters, choice.stage, train.accumulation_steps)
    e = element_bytes(gpu)
    return {
        "model": f"{config.model.size}, patch {list(config.model.patch)}",
        "gpus": W,
        "gpu": dataclasses.asdict(gpu),
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "flops_per_clip": step_flops_per_clip(config),
        "choice": {
            "train.zero_stage": choice.stage,
            "train.activation_checkpoint_every": choice.every,
            "train.batch_size": global_batch,
            "train.accumulation_steps": train.accumulation_steps,
            "batch_per_gpu": choice.batch,
        },
        "reasons": batch_reasons + reasons,
        "not_filled": None
        if advice is None
        else {
            "host_seconds": advice.time.host,
            "device_seconds": advice.time.device,
            "batch_per_gpu": advice.batch,
            "train.batch_size": advice.batch_size if advice.batch else None,
            "optim.lr": advice.learning_rates if advice.batch else None,
        },
        **facts,
        "step": {**vars(time), "total": time.total},
        "communication": {
            "reduced_gib": reduced_bytes(config, gpu) * reduced / GIB,
            "gathered_gib": e * gathered / GIB,
            "seconds": time.reduce + time.gather,
            "exposed_seconds": time.exposed,
            "bus_gb_per_s": bus_bandwidth(gpu, W) / 1e9 if W > 1 else None,
        },
        "data": {
            "clips_per_s_per_core": per_core,
            "cores": facts["clips_per_s"] / per_core,
            "cores_per_gpu": facts["clips_per_s"] / per_core / W,
            "read_gb_per_s": facts["clips_per_s"] * seconds * bytes_per_s / 1e9,
        },
        **_length(clips, facts["clips_per_s"], global_batch, W, request.price),
        "memory_table": _memory_table(config, gpu, parameters, W),
        "scaling": _scaling(config, gpu, parameters, choice, sorted({*SCALES, W})),
        "assumptions": _assumptions(
            config,
            gpu,
            choice.stage,
            per_core,
            request.clips_per_core is not None,
            time.convolution > 0,
        ),
    }


def _facts(
    config: Config, gpu: Gpu, parameters: Parameters, world_size: int, choice: Choice
) -> dict[str, Any]:
    """Work out memory and speed of a choice."""
    shape: dict[str, Any] = {
        "world_size": world_size,
        "batch": choice.batch,
        "stage": choice.stage,
        "every": choice.every,
    }
    need = memory(config, gpu, parameters, **shape)
    seconds = step_time(config, gpu, parameters, **shape).total
    rate = choice.batch * config.train.accumulation_steps / seconds
    return {
        "memory_per_gpu": need.total / GIB,
        "memory_parts": {name: size / GIB for name, size in vars(need).items()},
        "clips_per_s": rate * world_size,
        "clips_per_s_per_gpu": rate,
        "mfu": rate * step_flops_per_clip(config) / (gpu.peak_tflops * 1e12),
    }


def _memory_table(
    config: Config, gpu: Gpu, parameters: Parameters, world_size: int
) -> list[dict[str, Any]]:
    rows = []
    for stage in (1, 2, 3):
        for every in (None, 1):
            shape: dict[str, Any] = {"world_size": world_size, "stage": stage, "every": every}
            sizes = {
                str(b): memory(config, gpu, parameters, batch=b, **shape).total / GIB
                for b in BATCHES
            }
            most = largest_batch(config, gpu, parameters, **shape)
            rows.append(
                {
                    "zero_stage": stage,
                    "activation_checkpoint_every": every,
                    "gib": sizes,
                    "fit": most,
                }
            )
    return rows


def _scaling(
    config: Config, gpu: Gpu, parameters: Parameters, choice: Choice, sizes: list[int]
) -> list[dict[str, Any]]:
    """Work out the speed on other numbers of devices, with as many clips on each."""
    rows: list[dict[str, Any]] = []
    for W in sizes:
        facts = _facts(config, gpu, parameters, W, choice)
        row = {key: facts[key] for key in ("clips_per_s", "mfu", "memory_per_gpu")}
        rows.append({"gpus": W, **row})
    alone = rows[0]["clips_per_s"]
    return [{**row, "efficiency": row["clips_per_s"] / alone / row["gpus"]} for row in rows]


def _assumptions(
    config: Config, gpu: Gpu, stage: int, per_core: float, measured: bool, convolves: bool
) -> list[str]:
    D_share = f"{gpu.gemm_share:.0%} x D / (D + {gpu.half_width:g})" if gpu.half_width else ""
    return [
        f"{gpu.name}: {gpu.peak_tflops:.4g} TFLOP/s {gpu.precision}, {gpu.memory_gib:.4g} GiB, "
        f"{gpu.bandwidth_gb_s:.4g} GB/s; {gpu.per_node} to a machine, {gpu.link_gb_s:g} GB/s "
        f"within, {gpu.network_gb_s:g} GB/s a device between machines",
        f"reached: {D_share or f'{gpu.gemm_share:.0%}'} of the peak in matmul, "
        f"{gpu.attention_share:.0%} in attention, "
        + (f"{gpu.convolution_share:.0%} in grouped convolutions, " if convolves else "")
        + f"{gpu.bandwidth_share:.0%} of the bandwidth; "
        "launches, bytes and FLOPs of the operations as --ledger lists them",
        *_launching(config, gpu, stage),
        f"collectives in rings, {1e6 * HOP_S:.0f} us from machine to machine; reductions behind "
        f"{HIDDEN:.0%} of the backward pass, gathering after the step in the open (ZeRO 1, 2)",
        f"{gpu.base_gib:.3g} GiB for driver and libraries, allocations "
        f"{gpu.fragmentation - 1:.0%} larger than what they hold, ZeRO 3 keeps "
        f"{LIVE_ELEMENTS / 1e6:.0f} M weights gathered",
        f"a core makes {per_core:.0f} clips/s ready"
        + ("" if measured else " (a default: measure with ssast bench data --json, --loader)")
        + f"; FLAC of {config.audio.sample_rate_hz / 1000:g} kHz, "
        f"{config.audio.num_frames / 100:g} s a clip",
        "times without faults, validations and checkpoints; expect 30 % either way before "
        "--calibrate on the machine",
    ]


def _launching(config: Config, gpu: Gpu, stage: int) -> list[str]:
    if gpu.is_cpu:
        return []
    if not uses_graphs(config, stage):
        return [f"each kernel launched by itself, in {gpu.launch_us:g} us"]
    return [
        "masks, forward and backward pass launched as CUDA graphs (train.cuda_graphs), all else "
        f"in {gpu.launch_us:g} us each"
    ]


def clips_per_core(path: Path, gpu: Gpu) -> float:
    """Read clips per second and core from what ``ssast bench data --json`` printed.

    Raises:
        ConfigError: It is something else.
    """
    key = "files" if gpu.is_cpu else "files decode"
    try:
        return 1e3 / float(json.loads(path.read_text())[0]["cpu_ms"][key])
    except OSError as error:
        raise ConfigError(f"--loader {path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--loader {path}: expected what ssast bench data --json prints: {error!r}"
        ) from error


def _length(
    clips: float | None, clips_per_s: float, batch: int, gpus: int, price: float | None
) -> dict[str, float | None]:
    """Return the length of a run; nothing is known without its clips."""
    if clips is None:
        return dict.fromkeys(("clips", "steps", "days", "gpu_hours", "cost"))
    hours = clips / clips_per_s / 3600
    return {
        "clips": clips,
        "steps": math.ceil(clips / batch),
        "days": hours / 24,
        "gpu_hours": hours * gpus,
        "cost": None if price is None else hours * gpus * price,
    }


def format_plan(plan: dict[str, Any]) -> str:
    """Format a plan as text."""
    choice, data, wire, step = plan["choice"], plan["data"], plan["communication"], plan["step"]
    parts = plan["memory_parts"]
    lines = [
        f"{plan['model']} on {plan['gpus']:,} x {plan['gpu']['name']}",
        f"  parameters       {plan['parameters'] / 1e6:,.1f} M, "
        f"{plan['trained_parameters'] / 1e6:,.1f} M trained",
        f"  FLOPs per clip   {plan['flops_per_clip'] / 1e9:,.1f} G, forward and backward",
        "",
        "recommended: "
        + " ".join(
            f"{key}={'null' if value is None else value}"
            for key, value in choice.items()
            if key.startswith("train.")
        ),
        *(f"  {reason}" for reason in plan["reasons"]),
        "",
        f"  memory per GPU   {plan['memory_per_gpu']:.1f} of {plan['gpu']['memory_gib']:.0f} GiB: "
        + ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items() if gib > 0.005),
        f"  step             {1e3 * step['total']:.1f} ms: matmul {1e3 * step['matmul']:.1f}, "
        f"attention {1e3 * step['attention']:.1f}, "
        + (f"convolution {1e3 * step['convolution']:.1f}, " if step["convolution"] else "")
        + f"elementwise {1e3 * step['elementwise']:.1f}, "
        f"optimizer {1e3 * step['optimizer']:.1f}, waiting for others "
        f"{1e3 * step['exposed']:.1f} (launches take {1e3 * step['host']:.1f} beside that)",
        f"  communication    {wire['reduced_gib']:.2f} GiB reduced, {wire['gathered_gib']:.2f} GiB "
        f"gathered a step, {1e3 * wire['seconds']:.1f} ms, of which hidden "
        f"{1e3 * (wire['seconds'] - wire['exposed_seconds']):.1f} ms",
        f"  speed            {plan['clips_per_s']:,.0f} clips/s "
        f"({plan['clips_per_s_per_gpu']:,.1f} per GPU), MFU {plan['mfu']:.1%}",
        f"  data             {data['cores']:,.1f} CPU cores ({data['cores_per_gpu']:.1f} per GPU), "
        f"{data['read_gb_per_s']:.2f} GB/s read",
        f"  run              {_run(plan)}",
        "",
        "GiB per GPU by clips per GPU      "
        + "".join(f"{b:>9}" for b in BATCHES)
        + "   largest that fits",
    ]
    for row in plan["memory_table"]:
        name = f"ZeRO {row['zero_stage']}"
        name += ", all blocks recomputed" if row["activation_checkpoint_every"] else ""
        sizes = "".join(f"{gib:9.1f}" for gib in row["gib"].values())
        lines.append(f"  {name:32}{sizes}   {row['fit']:,}")
    lines += ["", f"with {choice['batch_per_gpu']} clips on each GPU"]
    lines += ["    GPUs      clips/s  efficiency     MFU  GiB per GPU"]
    for row in plan["scaling"]:
        lines.append(
            f"  {row['gpus']:6,}  {row['clips_per_s']:11,.0f}  {row['efficiency']:10.1%}  "
            f"{row['mfu']:6.1%}  {row['memory_per_gpu']:11.1f}"
        )
    return "\n".join([*lines, "", "assumed:", *(f"  {text}" for text in plan["assumptions"])])


def _run(plan: dict[str, Any]) -> str:
    if plan["clips"] is None:
        return "of a fine-tuning: as many clips as there are, times the epochs: --clips says it"
    text = f"{plan['clips']:,.0f} clips, {plan['steps']:,} steps: {_duration(plan['days'])}, "
    text += f"{plan['gpu_hours']:,.1f} GPU hours"
    return text + ("" if plan["cost"] is None else f", cost {plan['cost']:,.0f}")


def _duration(days: float) -> str:
    return f"{days:,.1f} days" if days >= 2 else f"{24 * days:,.1f} hours"


def draw_scaling(plan: dict[str, Any], path: Path) -> None:
    """Plot clips per second and hours over the number of devices, as PNG."""
    rows = plan["scaling"]
    sizes = [row["gpus"] for row in rows]
    rates = [row["clips_per_s"] for row in rows]
    figure, (left, right) = subplots(1, 2, figsize=(11, 4.2))
    ideal = [rates[0] * n / sizes[0] for n in sizes]
    left.loglog(sizes, ideal, "--", color="grey", lw=1, label="linear")
    left.loglog(sizes, rates, "o-", ms=4, label="planned")
    for row in rows[::3]:
        left.annotate(
            f"{row['efficiency']:.0%}",
            (row["gpus"], row["clips_per_s"]),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
    left.set(xlabel="GPUs", ylabel="clips per second", title="speed, and efficiency")
    left.legend()
    clips = plan["clips"] or 1e6
    hours = [clips / rate / 3600 for rate in rates]
    right.loglog(sizes, hours, "o-", ms=4, color="tab:red")
    right.axvline(plan["gpus"], color="grey", lw=0.8, ls=":")
    right.set(xlabel="GPUs", ylabel="hours", title=f"time for {clips / 1e6:,.1f} M clips")
    for axes in (left, right):
        axes.set_xticks(sizes[::2], [str(n) for n in sizes[::2]], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{plan['model']}, {plan['choice']['batch_per_gpu']} clips on each {plan['gpu']['name']}, "
        f"ZeRO stage {plan['choice']['train.zero_stage']}",
        fontsize=11,
    )
    save_figure(figure, path, dpi=120)
