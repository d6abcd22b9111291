"""The cores that this process may use, and how OpenMP's threads wait for each other on them.

A container's quota and a Slurm job's share bound the cores as the CPU affinity does, but libraries
look at the affinity alone: with half a core they start a thread for each core of the machine.

Between two operations the threads of an OpenMP team spin, so that the next one starts at once. Left
alone, GNU's OpenMP (libgomp, which torch's Linux wheels carry) spins for milliseconds: beside other
busy processes that is time in which a thread that has work to do is not run, at each operation.
Without spinning at all, an idle machine loses a tenth. A short spin is as good as the better of the
two. It must be set in the environment before torch is imported.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

SPIN_COUNT = 2000  # turns of libgomp's loop, some 50 us
BLOCKTIME_MS = 1  # of Intel's and LLVM's OpenMP, the least above none
WAITING = {"GOMP_SPINCOUNT": str(SPIN_COUNT), "KMP_BLOCKTIME": str(BLOCKTIME_MS)}
"""Variables of the environment that bound the spinning."""

CHOSEN_BY = (*WAITING, "OMP_WAIT_POLICY", "KMP_LIBRARY")  # any of them: the user has chosen
_NO_STEP = 0xFFFFFFF0  # Slurm's numbers of batch scripts and interactive shells, which have no task

_set: dict[str, str] = {}  # what prepare_threads has set


class Cores(NamedTuple):
    """A number of cores.

    Attributes:
        number: At least 1; a part of a core counts as one.
        source: What bounds it.
    """

    number: int
    source: str


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return find_cores().number


def find_cores(root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> Cores:
    """Return the cores that this process may use: by CPU affinity, cgroup quotas and Slurm.

    Args:
        root: Where ``proc`` and ``sys`` are.
        env: The environment.
    """
    found = [Cores(len(os.sched_getaffinity(0)), "CPU affinity"), *_slurm(env)]
    found += (Cores(max(1, math.ceil(quota)), source) for quota, source in _quotas(root))
    return min(found, key=lambda cores: cores.number)


def prepare_threads(env: MutableMapping[str, str] = os.environ) -> None:
    """Set what OpenMP's threads read once, when torch is imported; what the user has set stays.

    For programs, before they import torch: the short spin, and the number of threads where there
    are fewer cores than the CPU affinity has. (Ranks of a launcher share the cores; see
    :func:`~ssast.engine.parallel.ranks.init_world`.)
    """
    if "torch" in sys.modules:
        return
    chosen = spinning(env)
    cores = usable_cores()
    alone = not any(key in env for key in ("RANK", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE"))
    if alone and "OMP_NUM_THREADS" not in env and cores < len(os.sched_getaffinity(0)):
        chosen["OMP_NUM_THREADS"] = str(cores)
    env.update(chosen)
    _set.update(chosen)


def spinning(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that bound the spinning of a new process; none if the user has chosen.

    Args:
        env: The environment that it would have without.
    """
    return {} if any(key in env for key in CHOSEN_BY) else dict(WAITING)


def describe_waiting(env: Mapping[str, str] = os.environ) -> str:
    """Return which variables bound the spinning of this process, and who has set them."""
    given = [f"{key}={env[key]}" for key in CHOSEN_BY if key in env]
    if not given:
        return "default of the OpenMP library"
    return f"{' '.join(given)} ({'ssast' if WAITING.keys() & _set.keys() else 'environment'})"


def chosen_threads(env: Mapping[str, str], parent: Path | None = None) -> bool:
    """Return whether the user, or who has started this process, has chosen the number of threads.

    The 1 that torchrun sets where there is none is no choice: it would leave cores idle.

    Args:
        env: The environment.
        parent: File with the environment that the parent process began with.
    """
    if "OMP_NUM_THREADS" not in env:
        return False
    if env["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in env:
        return True
    path = parent or Path(f"/proc/{os.getppid()}/environ")
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + path.read_bytes()
    except OSError:
        return True


def _slurm(env: Mapping[str, str]) -> Iterator[Cores]:
    """Yield the cores of a Slurm task, or of the job on this machine."""
    step = env.get("SLURM_STEP_ID", "")
    is_task = step.isdecimal() and int(step) < _NO_STEP
    names = ["SLURM_CPUS_ON_NODE"] + ["SLURM_CPUS_PER_TASK"] * is_task
    for name in names:
        if env.get(name, "").isdecimal() and int(env[name]):
            yield Cores(int(env[name]), name)


def _quotas(root: Path) -> Iterator[tuple[float, str]]:
    """Yield the CPU quotas of this process's control groups and of those above, in cores."""
    for folder, file in _groups(root):
        try:
            if file == "cpu.max":
                quota, period = (folder / file).read_text().split()
            else:
                quota = (folder / file).read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            cores = float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):  # "max"; the top group has no file
            continue
        if cores > 0:  # -1: no quota
            shown = Path("/", folder.relative_to(root), file)
            yield cores, f"quota of {cores:.3g} cores in {shown}"


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of this process's control groups up to the mount, and the file to read."""
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):  # number:controllers:path
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, others = line.partition(" - ")
        top, mounted = (_unescaped(field) for field in fields.split()[3:5])
        kind, _, options = others.split()[:3]
        if kind == "cgroup2":
            group, file = paths.get(""), "cpu.max"
        elif kind == "cgroup" and "cpu" in options.split(","):
            group, file = paths.get("cpu"), "cpu.cfs_quota_us"
        else:
            continue
        if group is None:
            continue
        mount = root / mounted.lstrip("/")
        # A container may see a group alone, and those below it; ours may be named from above.
        inside = Path(group).is_relative_to(top) and ".." not in Path(group).parts
        below = Path(group).relative_to(top) if inside else Path()
        for folder in (below, *below.parents):
            yield mount / folder, file


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)
