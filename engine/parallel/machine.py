"""The machine of this process: its memory, and which ranks share it."""

import socket
from pathlib import Path

import psutil

from ssast.engine.parallel.ranks import World, gather_objects
from ssast.pipelines.files import machine_id

CGROUP = Path("/sys/fs/cgroup")


def available_gib() -> float:
    """Return the main memory that this process and its children may still take."""
    left, limit = psutil.virtual_memory().available, _limit()
    if limit is not None:
        left = min(left, limit - int((CGROUP / "memory.current").read_text()))
    return left / 2**30


def total_gib() -> float:
    """Return the main memory of this machine, or of its container where that is less."""
    total, limit = psutil.virtual_memory().total, _limit()
    return (total if limit is None else min(total, limit)) / 2**30


def _limit() -> int | None:
    """Return the bytes that the control group may take: psutil knows the machine alone."""
    path = CGROUP / "memory.max"
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def machines_of(world: World) -> list[str]:
    """Return a name of each rank's machine, equal where they can share memory. Collective.

    Containers of one machine that do not see each other's processes count as several.
    """
    return gather_objects(machine_id() or socket.gethostname(), world)
