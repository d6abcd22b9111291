"""The machine of this process: its memory, and which ranks share it."""

import os
import socket
from pathlib import Path

import psutil

from ssast.engine.parallel.ranks import World, gather_objects

CGROUP = Path("/sys/fs/cgroup")


def available_gib() -> float:
    """Return the main memory that this process and its children may still take."""
    left = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip() != "max":  # psutil knows the machine alone
        left = min(left, int(limit.read_text()) - int(used.read_text()))
    return left / 2**30


def machines_of(world: World) -> list[str]:
    """Return a name of each rank's machine, equal where they can share memory. Collective.

    Containers of one machine that do not see each other's processes count as several.
    """
    return gather_objects(_machine(), world)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
