"""A reader under test, its inputs, and what becomes of one of them."""

import contextlib
import resource
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ssast.benchmarks.fuzzing.mutations import Files, mutated
from ssast.engine.errors import CheckpointError, ConfigError
from ssast.pipelines.errors import DataError, UnusableError

Outcome = Literal["accepted", "refused", "error", "crash", "hang", "memory"]
FAILURES: tuple[Outcome, ...] = ("error", "crash", "hang", "memory")
REFUSALS = (DataError, UnusableError, ConfigError, CheckpointError)  # what a reader may raise
LONGEST_MESSAGE = 20_000  # characters: a longer one repeats what it found
NO_MEMORY = ("allocate memory", "bad_alloc", "Cannot allocate", "Unable to allocate")


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    Attributes:
        what: What it reads, for the table.
        seeds: Makes the files that are mutated; none where a program is missing.
        read: Reads the files of a folder, as the program does.
        share: Share of all inputs, relative to the others.
        pack: Makes the files that are written out of those that were mutated.
    """

    what: str
    seeds: Callable[[], list[Files]]
    read: Callable[[Path], None]
    share: int = 1
    pack: Callable[[Mapping[str, bytes]], Files] = dict


@dataclass(frozen=True)
class Limits:
    """Limits of one input."""

    seconds: float = 10.0
    """Time of its own; a process that is given none, or waits, has six times as long."""

    memory_mib: float = 256.0
    """Growth of the process's resident memory at its peak."""

    address_mib: float = 4096.0
    """Growth of its address space, beyond which an allocation fails."""


@dataclass(frozen=True)
class Result:
    """What became of an input."""

    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    memory_mib: float = 0.0


def make_input(name: str, reader: Reader, seeds: list[Files], seed: int, number: int) -> Files:
    """Return the mutated input of a number; the same on each machine with the same libraries."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    files = seeds[int(random.integers(len(seeds)))]
    return reader.pack(mutated(files, seeds, random))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def attempt(read: Callable[[Path], None], folder: Path, limits: Limits) -> Result:
    """Give the files of a folder to a reader, in this process."""
    before = memory_mib("VmRSS")
    with contextlib.suppress(OSError):  # from here on counts the peak
        Path("/proc/self/clear_refs").write_text("5")
    outcome, detail = _outcome(read, folder)
    grown = memory_mib("VmHWM") - before
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    most = max(grown, children - before)
    if outcome in ("accepted", "refused") and most > limits.memory_mib:
        outcome, detail = "memory", f"{most:.0f} MiB more at the peak; {detail}"
    return Result(outcome, detail, memory_mib=grown)


def _outcome(read: Callable[[Path], None], folder: Path) -> tuple[Outcome, str]:
    try:
        read(folder)
        return "accepted", ""
    except REFUSALS as error:
        text = f"{type(error).__name__}: {error}"
        if len(text) > LONGEST_MESSAGE:
            return "error", f"a message of {len(text)} characters: {text[:200]}"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or any(word in str(cause) for word in NO_MEMORY):
                return "memory", f"{type(cause).__name__}: {cause!s:.300}"
            cause = cause.__cause__ or cause.__context__
        return "refused", text[:300]
    except MemoryError as error:
        return "memory", f"MemoryError: {error!s:.300} {_place(error)}"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error!s:.300} {_place(error)}"


def _place(error: BaseException) -> str:
    """Return the line of our code that an exception came through last."""
    found, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if any(f"/{room}/" in path for room in ("engine", "pipelines", "kernels")):
            found = f"({Path(path).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def memory_mib(field: str) -> float:
    """Return a field of this process's status, such as VmRSS, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)
