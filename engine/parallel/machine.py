"""The machine of this process: its memory, and which ranks share it."""

import socket
from pathlib import Path

import psutil

from ssast.engine.parallel.ranks import World, gather_objects
from ssast.pipelines.files import machine_id

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
    return gather_objects(machine_id() or socket.gethostname(), world)
