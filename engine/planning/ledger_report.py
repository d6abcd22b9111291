"""A ledger as text, and as JSON."""

from typing import Any

from ssast.engine.planning.ledger import BACKWARD, PHASES, Ledger, Row
from ssast.engine.planning.recorder import Wait

GIB = 2**30
_REST = tuple(phase for phase in PHASES if phase != BACKWARD)


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
    every = train.activation_checkpoint_every
    lines = [
        f"one step of {config.model.size}, patch {list(config.model.patch)}, "
        f"{'pretraining' if config.finetune is None else 'fine-tuning'}: {ledger.batch} clips"
        + (f" x {train.accumulation_steps}" if train.accumulation_steps > 1 else "")
        + f" on one {gpu.name}, {gpu.precision}"
        + (f", every {every}. block recomputed" if every else ""),
        f"least times at {gpu.peak_tflops:,.0f} TFLOP/s and {gpu.bandwidth_gb_s:,.0f} GB/s",
        "",
        f"{'':18}{'launches':>16}{'GB moved':>18}{'GB':>16}{'':9}{'least ms':>18}",
        f"{'':18}{'forward':>8}{'backward':>9}{'forward':>9}{'backward':>9}"
        f"{'read':>8}{'written':>8}{'TFLOP':>8}{'forward':>9}{'backward':>9}{'share':>7}",
    ]
    before, after = ledger.rows(*_REST), ledger.rows(BACKWARD)
    for name, row in [*ledger.rows().items(), ("all", total)]:
        if name == "all":
            first, second = ledger.total(*_REST), ledger.total(BACKWARD)
        else:
            first, second = before.get(name, Row(name)), after.get(name, Row(name))
        lines.append(
            f"{name:18}{first.kernels:8,}{second.kernels:9,}"
            f"{first.moved / 1e9:9.2f}{second.moved / 1e9:9.2f}"
            f"{row.read / 1e9:8.2f}{row.written / 1e9:8.2f}{row.flops / 1e12:8.2f}"
            f"{1e3 * first.seconds:9.2f}{1e3 * second.seconds:9.2f}"
            f"{row.seconds / total.seconds:7.1%}"
        )
    parts = sorted(recording.at_peak.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.005 * GIB)
    lines += [
        "",
        f"the host launches for {total.kernels * gpu.launch_us / 1e3:.1f} ms "
        f"({total.kernels:,} x {gpu.launch_us:g} us) beside the device's "
        f"{1e3 * total.seconds:.1f} ms or more",
        f"memory in use: at most {recording.peak / GIB:.2f} GiB ({shown})",
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
