"""The machine of a measurement: its processor, by name and instruction sets."""

import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ssast.benchmarks.operations.kernels import machine_facts

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # flags of /proc/cpuinfo
# What AMD's processors are, by family and the first model after those of the row; their names
# often do not say.
ZEN = {
    23: ((0x30, "Zen"), (0x100, "Zen 2")),
    25: ((0x10, "Zen 3"), (0x20, "Zen 4"), (0x60, "Zen 3"), (0x80, "Zen 4"), (0xA0, "Zen 3"),
         (0x100, "Zen 4")),
    26: ((0x100, "Zen 5"),),
}  # fmt: skip


def describe_machine(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Return the facts of a machine that results depend on, with versions, commit, day and load.

    Args:
        device: What computes.
        cpuinfo: The kernel's description of the processors.
    """
    facts = machine_facts(device)
    found = processor(cpuinfo.read_text())
    words = [found["cpu"], found["microarchitecture"] or ""]
    if device.type == "cuda":
        words = [facts["device"], "beside", *words]
    return {
        "name": f"{' '.join(word for word in words if word)}, {facts['cores']} cores",
        **found,
        **facts,
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def processor(cpuinfo: str) -> dict[str, Any]:
    """Return name, microarchitecture and instruction sets of the first processor of a machine.

    Args:
        cpuinfo: Text of /proc/cpuinfo.
    """
    first = cpuinfo.split("\n\n")[0]
    facts = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    name = re.sub(r"\((R|TM)\)|\s+\d+-Core Processor|\s+@.*", "", facts.get("model name", "CPU"))
    return {
        "cpu": " ".join(name.split()),
        "microarchitecture": _zen(facts),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
    }


def _zen(facts: dict[str, str]) -> str | None:
    if facts.get("vendor_id") != "AuthenticAMD":
        return None
    model = int(facts["model"])
    rows = ZEN.get(int(facts["cpu family"]), ())
    return next((name for end, name in rows if model < end), None)
