"""A ledger as text, and as JSON."""

from typing import Any

from ssast.engine.planning.ledger import (
    BACKWARD,
    FORWARD,
    INPUTS,
    LOSS,
    PHASES,
    STEP,
    Ledger,
    Row,
)
from ssast.engine.planning.recorder import Wait

GIB = 2**30
_COLUMNS = ((INPUTS, FORWARD, LOSS), (BACKWARD,), (STEP,))
_WIDTHS = (8, 9, 8)


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, _WIDTHS, strict=True))


_HEADER = _cells(["forward", "backward", "step"])


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """Return a ledger ready for JSON: bytes, FLOPs, and seconds on its GPU."""
    config, gpu, recording = ledger.config, ledger.gpu, ledger.recording
    total = ledger.total()
    return {
        "model": f"{config.model.size}, patch {list(config.model.patch)}",
        "task": "pretraining" if config.finetune is None else "fine-tuning",
        "gpu": gpu.name,
        "batch_per_gpu": ledger.batch,
        "accumulation_steps": config.train.accumulation_steps,
        "activation_checkpoint_every": config.train.activation_checkpoint_every,
        "groups": {name: _numbers(row) for name, row in ledger.rows().items()},
        "phases": {
            phase: {name: _numbers(row) for name, row in ledger.rows(phase).items()}
            for phase in PHASES
        },
        "total": _numbers(total),
        "launch_seconds": total.kernels * gpu.launch_us * 1e-6,
        "peak_bytes": recording.peak,
        "peak_parts": recording.at_peak,
        "waits": [vars(wait) for wait in recording.waits],
    }


def _numbers(row: Row) -> dict[str, float]:
    return {
        "launches": row.kernels,
        "bytes_read": row.read,
        "bytes_written": row.written,
        "flops": row.flops,
        "seconds": row.seconds,
    }


def format_ledger(ledger: Ledger) -> str:
    """Format a ledger as a table: groups of operations, memory, and waits of the host."""
    config, gpu, recording = ledger.config, ledger.gpu, ledger.recording
    train, total = config.train, ledger.total()
    every, cpu = train.activation_checkpoint_every, gpu.is_cpu
    scale, unit, counted = (1e9, "GFLOP", "operations") if cpu else (1e12, "TFLOP", "launches")
    lines = [
        f"one step of {config.model.size}, patch {list(config.model.patch)}, "
        f"{'pretraining' if config.finetune is None else 'fine-tuning'}: {ledger.batch} clips"
        + (f" x {train.accumulation_steps}" if train.accumulation_steps > 1 else "")
        + f" on one {gpu.name}, {gpu.precision}"
        + (f", every {every}. block recomputed" if every else ""),
        f"least times at {gpu.peak_tflops * 1e12 / scale:,.0f} {unit}/s and "
        f"{gpu.bandwidth_gb_s:,.3g} GB/s",
        "",
        f"{'':20}{counted:^25}{'GB moved':^25}{'GB':^17}{'':8}{'least ms':^25}",
        f"{'':20}{_HEADER}{_HEADER}{'read':>9}{'written':>8}{unit:>8}{_HEADER}{'share':>7}",
    ]
    tables = [ledger.rows(*phases) for phases in _COLUMNS]
    for name, row in [*ledger.rows().items(), ("all", total)]:
        if name == "all":
            parts = [ledger.total(*phases) for phases in _COLUMNS]
        else:
            parts = [table.get(name, Row(name)) for table in tables]
        kernels = [f"{part.kernels:,}" for part in parts]
        moved = [f"{part.moved / 1e9:.2f}" for part in parts]
        times = [f"{1e3 * part.seconds:.2f}" for part in parts]
        lines.append(
            f"{name:20}{_cells(kernels)}{_cells(moved)}"
            f"{row.read / 1e9:9.2f}{row.written / 1e9:8.2f}{row.flops / scale:8.2f}"
            f"{_cells(times)}{row.seconds / total.seconds:7.1%}"
        )
    held = sorted(recording.at_peak.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held if size >= 0.005 * GIB)
    memory = f"memory in use: at most {recording.peak / GIB:.2f} GiB ({shown})"
    if cpu:
        return "\n".join([*lines, "", memory])
    lines += [
        "",
        f"the host launches for {total.kernels * gpu.launch_us / 1e3:.1f} ms "
        f"({total.kernels:,} x {gpu.launch_us:g} us) beside the device's "
        f"{1e3 * total.seconds:.1f} ms or more",
        memory,
    ]
    lines.append("the host waits for the device: " + ("" if recording.waits else "nowhere"))
    return "\n".join([*lines, *_waits(recording.waits)])


def _waits(waits: list[Wait]) -> list[str]:
    places: dict[tuple[str, str, str], int] = {}
    for wait in waits:
        key = wait.phase, wait.where, wait.what
        places[key] = places.get(key, 0) + 1
    return [
        f"  {number} x in {phase}: {what}, {where}"
        for (phase, where, what), number in places.items()
    ]
