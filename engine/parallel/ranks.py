"""Ranks: the launcher of this process, its device, and collectives of Python values.

The same program runs as plain ``python``, under ``torchrun``, the ``deepspeed`` launcher, ``srun``
and ``mpirun``. A process alone needs neither a port nor a launcher. Nothing here imports
DeepSpeed.
"""

import atexit
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssast.engine.errors import ConfigError, LostPeer
from ssast.engine.parallel.meeting import agree_on_attempt
from ssast.pipelines.cores import chosen_threads, usable_cores

DRIVER = Path("/proc/driver/nvidia/version")  # where NVIDIA's kernel module is loaded
SET_BY_TORCH_AND_DEEPSPEED = ("DS_", "KMP_", "PYTORCH_", "TORCHINDUCTOR_")  # in the environment

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        rank: 0 <= rank < world_size; rank 0 writes files and prints.
        local_rank: rank among the processes of this machine.
        world_size: number of processes, one per device.
        launcher: "single", "torchrun", "deepspeed", "env", "slurm" or "mpi".
        device: the device this process computes on.
        timeout_s: how long a collective waits for the other ranks before it fails.
        cores: processor cores for this process, its share of the machine's.
    """

    rank: int
    local_rank: int
    world_size: int
    launcher: str
    device: torch.device
    timeout_s: float = 600.0
    cores: int = field(default_factory=usable_cores)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """What a launcher left in the environment; address and port of rank 0."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    address: str = "127.0.0.1"
    port: int = 29500
    local_world_size: int = 1
    """Processes on this machine that share its cores."""


_world: World | None = None
_environment: dict[str, str | None] = {}  # what init_world replaced, for close_world


def _integer(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    """Return an environment variable as an integer."""
    text = env.get(key)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"environment variable {key}: expected a whole number, found {text!r}")
    return int(text)


def first_host(nodes: str) -> str:
    """Return the first machine of a Slurm node list: "gpu[003-007,12],x1" is "gpu003"."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise ConfigError(f"environment variable SLURM_STEP_NODELIST: no machine in {nodes!r}")
    return "".join(part or "" for part in match.groups())


def read_launch(env: Mapping[str, str]) -> Launch:
    """Recognise the launcher from its environment variables, without changing them.

    Raises:
        ConfigError: the variables contradict each other or are incomplete.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = "env"
        if "TORCHELASTIC_RUN_ID" in env:
            launcher = "torchrun"
        elif "CROSS_RANK" in env:
            launcher = "deepspeed"
        rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        local = per_machine = _integer(
            env, "LOCAL_WORLD_SIZE", _integer(env, "LOCAL_SIZE", world_size)
        )
        local_rank = _integer(env, "LOCAL_RANK", rank % max(per_machine, 1))
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in env]
        if missing and world_size > 1:
            raise ConfigError(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}")
    elif "SLURM_STEP_ID" in env and _integer(env, "SLURM_NTASKS", 1) > 1:
        launcher = "slurm"
        rank, local_rank = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
        world_size = _integer(env, "SLURM_STEP_NUM_TASKS", _integer(env, "SLURM_NTASKS"))
        # With --cpus-per-task each process is bound to cores of its own.
        local = 1 if "SLURM_CPUS_PER_TASK" in env else _tasks_here(env, world_size)
    elif _integer(env, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        launcher = "mpi"
        rank = _integer(env, "OMPI_COMM_WORLD_RANK")
        local_rank = _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        world_size = _integer(env, "OMPI_COMM_WORLD_SIZE")
        local = _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE", world_size)
        if "MASTER_ADDR" not in env:
            raise ConfigError("mpirun: pass the address of rank 0 on, with -x MASTER_ADDR")
    else:
        return Launch("single", rank=0, local_rank=0, world_size=1)
    if not rank < world_size:
        raise ConfigError(f"environment: rank {rank} of a world of {world_size}")
    address, port = env.get("MASTER_ADDR", "127.0.0.1"), _integer(env, "MASTER_PORT", 29500)
    if launcher == "slurm" and "MASTER_ADDR" not in env:
        address = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
    if launcher == "slurm" and "MASTER_PORT" not in env:  # two jobs on one machine must not meet
        port = 20000 + (_integer(env, "SLURM_JOB_ID") + 7 * _integer(env, "SLURM_STEP_ID")) % 20000
    return Launch(launcher, rank, local_rank, world_size, address, port, max(local, 1))


def _tasks_here(env: Mapping[str, str], world_size: int) -> int:
    """Count the processes of a Slurm step on this machine; "2(x3),1" means 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world_size


def init_world(timeout_s: float = 600.0) -> World:
    """Join the run: process group, device and environment. A second call returns the same world.

    Args:
        timeout_s: how long any collective waits before the run fails instead of hanging.

    Raises:
        ConfigError: incomplete launcher variables, or more processes than GPUs.
        LostPeer: the other processes did not come in time.
    """
    global _world
    if _world is not None:
        return _world
    launch = read_launch(os.environ)
    device, index = _pick_device(launch)
    # DeepSpeed and NCCL read these; LOCAL_RANK is the index of the device for DeepSpeed.
    _set_environment(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(index),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    timeout = timedelta(seconds=timeout_s)
    store: dist.Store
    if launch.world_size == 1:
        store = dist.HashStore()  # no port that another process could hold
    else:
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
            name = agree_on_attempt(store, launch.rank, launch.world_size, timeout_s)
            store = dist.PrefixStore(name, store)
        except dist.DistError as error:
            raise LostPeer(
                f"rank {launch.rank} of {launch.world_size} has met no other process at "
                f"{launch.address}:{launch.port}: {first_line(error)}"
            ) from error
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    cores = max(1, usable_cores() // launch.local_world_size)
    if not chosen_threads(os.environ):  # torch would take all cores in each process
        torch.set_num_threads(cores)
    _world = World(
        launch.rank, launch.local_rank, launch.world_size, launch.launcher, device, timeout_s, cores
    )
    atexit.register(close_world)
    return _world


def close_world() -> None:
    """Leave the process group and restore the environment; harmless when there is no world."""
    global _world
    if _world is None:
        return
    _world = None
    atexit.unregister(close_world)
    if dist.is_initialized():
        comm: Any = sys.modules.get("deepspeed.comm.comm")
        if comm is not None and comm.cdb is not None:
            comm.destroy_process_group()  # DeepSpeed forgets its groups as well
            comm.cdb = None
        else:
            dist.destroy_process_group()
    for key, value in _environment.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    _environment.clear()


@contextmanager
def leaving_world() -> Iterator[None]:
    """Leave the world that is joined inside, unless this process was in one before.

    What torch and DeepSpeed have set in the environment meanwhile is removed, too.
    """
    if _world is not None:
        yield
        return
    before = set(os.environ)
    try:
        yield
    finally:
        close_world()
        for key in os.environ.keys() - before:
            if key.startswith(SET_BY_TORCH_AND_DEEPSPEED):
                del os.environ[key]


@contextmanager
def imagined_world(world: World) -> Iterator[World]:
    """Take the part of one rank whose collectives do nothing, for tensors without data.

    Raises:
        RuntimeError: This process is in a world already.
    """
    global _world
    if _world is not None:
        raise RuntimeError("this process takes part in a run")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _set_environment(
        RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(world.local_rank)
    )
    dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.world_size)
    _world = world
    try:
        yield world
    finally:
        close_world()


def _set_environment(**variables: str) -> None:
    for key, value in variables.items():
        _environment[key] = os.environ.get(key)
        os.environ[key] = value


def _pick_device(launch: Launch) -> tuple[torch.device, int]:
    """Return the device of this process and its index; make it the current one."""
    if not torch.cuda.is_available():
        if launch.local_rank == 0 and DRIVER.exists():
            built = torch.version.cuda
            _log.warning(
                "there is an NVIDIA driver, but PyTorch %s, %s, can use no GPU: the CPU is used",
                torch.__version__,
                f"which needs a driver of CUDA {built}" if built else "which is built without CUDA",
            )
        return torch.device("cpu"), launch.local_rank
    count, index = torch.cuda.device_count(), launch.local_rank
    if launch.launcher == "slurm" and count == 1:
        index = 0  # srun --gpus-per-task shows each process its own GPU alone
    if index >= count:
        raise ConfigError(f"local rank {index}: this machine shows {count} GPUs")
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default rounds fp32 convolutions to 10 bits
    return torch.device("cuda", index), index


def reduce_sum(values: Sequence[float], world: World) -> list[float]:
    """Sum each value over all ranks, in float64: exact for counters below 2**53. Collective."""
    return _reduce(values, world, dist.ReduceOp.SUM)


def reduce_max(values: Sequence[float], world: World) -> list[float]:
    """Return the largest of each value over all ranks, for example of a stop flag. Collective."""
    return _reduce(values, world, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], world: World, op: dist.ReduceOp.RedOpType) -> list[float]:
    if world.world_size == 1 or not values:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def gather_rows(rows: Tensor, values: Tensor, count: int, world: World) -> tuple[Tensor, Tensor]:
    """Gather the rows of all ranks on the CPU of every rank. Collective.

    Args:
        rows: [n] int64, where this rank's values belong; no other rank has them.
        values: [n, C] float32.
        count: Rows in all.
        world: This process's world.

    Returns:
        Values [count, C] float32, 0 where no rank had one, and which they had, [count] bool.
    """
    whole = torch.zeros(count, values.shape[1] + 1, device=world.device)
    whole[rows.to(world.device)] = torch.nn.functional.pad(values.to(world.device), (0, 1), value=1)
    if world.world_size > 1:
        dist.all_reduce(whole)
    whole = whole.cpu()
    return whole[:, :-1], whole[:, -1] > 0


def broadcast_object(value: T, world: World) -> T:
    """Return the value of rank 0 on every rank; small and picklable. Collective."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather_objects(value: T, world: World) -> list[T]:
    """Return the values of all ranks on every rank; small and picklable. Collective."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def expecting_peers(world: World) -> Iterator[None]:
    """Raise LostPeer where another process is gone, and other errors as they are.

    Raises:
        LostPeer: a collective inside has failed because another rank is gone or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or (
            type(error) is RuntimeError
            and re.search(r"gloo|closed by peer|timed out", str(error), re.I)
        )
        if world.world_size == 1 or not lost:
            raise
        raise LostPeer(
            f"rank {world.rank} has lost another process of the run ({first_line(error)}): "
            "start all of them again with --resume"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its place in the source."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S*:\d+\]\s*", "", lines[0])


def run_on_main(function: Callable[[], T], world: World) -> T:
    """Call the function on rank 0 alone; its result, or its error, reaches every rank.

    For files: a full disk must stop all ranks with the same message, not leave all but one of
    them waiting in the next collective. Collective.

    Args:
        function: called on rank 0; its result is small and picklable.
        world: this process's world.

    Raises:
        ValueError: the function raised it (or a subclass, such as CheckpointError) on rank 0.
        OSError: likewise.
        RuntimeError: likewise.
    """
    if world.world_size == 1:
        return function()
    outcome: tuple[T | None, ValueError | OSError | RuntimeError | None] = (None, None)
    if world.is_main:
        try:
            outcome = (function(), None)
        except (ValueError, OSError, RuntimeError) as error:
            outcome = (None, error)
    result, failure = broadcast_object(outcome, world)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
