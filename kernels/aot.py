"""Compile kernels ahead of time, for GPUs that are not there, and read the result.

A launch is recorded instead of run: the kernel, its arguments (tensors on the ``meta`` device will
do) and its block sizes are those of the real launch, and they are specialised by Triton's own
rules. Triton brings the assembler and the disassembler along, so no CUDA toolkit is needed.
"""

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch.library import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ssast.kernels.interpret import replaced

ARCHITECTURES = (80, 90, 100)

# CUDA C++ Programming Guide, technical specifications per compute capability.
_SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_SHARED_PER_CTA = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_REGISTERS_PER_SM, _WARPS_PER_SM, _CTAS_PER_SM = 1 << 16, 64, 32
_TENSOR_MEMORY_COLUMNS = 512  # of an SM, from sm_100 on

_TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One recorded ``kernel[grid](...)``."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a kernel compiled to.

    Attributes:
        kernel: Name of the kernel.
        arch: Architecture, such as "sm_90".
        num_warps: Warps of a CTA.
        registers: Registers of a thread.
        spill_bytes: Bytes that instructions move between registers and local memory.
        shared_bytes: Shared memory of a CTA.
        shared_limit_bytes: Shared memory that the device has for a CTA.
        ctas_per_sm: How many CTAs an SM holds at a time; 0 where not even one fits.
        tensor_core_ops: Instructions of this architecture's tensor cores (HMMA, HGMMA, UTCMMA).
        load128: Loads of 128 bits from global memory, asynchronous copies and bulk loads included.
        loads: All loads from global memory.
        atomics: Atomic operations on global memory.
        instructions: Instructions of the whole kernel.
    """

    kernel: str
    arch: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    ctas_per_sm: int
    tensor_core_ops: int
    load128: int
    loads: int
    atomics: int
    instructions: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches in a list instead of running them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(Launch(self, tuple(grid), args, kwargs))

    with replaced(JITFunction, run=run):
        yield launches


class _Source(ASTSource):
    """A kernel to compile, whose Python is parsed by one thread at a time.

    The parser of Python before 3.11.8 fails when several threads use it (python/cpython#106905).
    """

    _parsing = threading.RLock()

    def hash(self) -> str:
        with self._parsing:
            return super().hash()

    def make_ir(self, *args: Any) -> Any:
        with self._parsing:
            return super().make_ir(*args)


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one recorded launch for an architecture (80, 90, 100)."""
    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.kwargs, "debug": False}, bound, specialization, options
    )
    source = _Source(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return _read(launch.kernel.fn.__name__, arch, compiled)


def _read(name: str, arch: int, compiled: Any) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        listing = _tool("nvdisasm", "-c", cubin)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    registers = int(found[1])
    # "/*0af0*/  @!P0 LDG.E.128 R4, [R2] ;" to "LDG.E.128"
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", listing)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, operation)) for operation in operations)

    widths = (re.search(r"\.(64|128)", o) for o in operations if re.match(r"(STL|LDL)\b", o))
    metadata = compiled.metadata
    shared, warps = metadata.shared, metadata.num_warps
    limit = _SHARED_PER_CTA[arch]
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    resident = min(
        _REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * warps),
        _SHARED_PER_SM[arch] // (shared + 1024),  # 1 KiB of each CTA is the system's
        _WARPS_PER_SM // warps,
        _CTAS_PER_SM,
        _TENSOR_MEMORY_COLUMNS // max(1, tensor_memory),
    )
    return Report(
        kernel=name,
        arch=f"sm_{arch}",
        num_warps=warps,
        registers=registers,
        spill_bytes=sum(int(width[1]) // 8 if width else 4 for width in widths),
        shared_bytes=shared,
        shared_limit_bytes=limit,
        ctas_per_sm=resident if shared <= limit else 0,
        tensor_core_ops=count(_TENSOR_CORE[arch] + r"\b"),
        load128=count(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG|UBLKCP"),
        loads=count(r"LDG\b|LDGSTS\b|UTMALDG|UBLKCP"),
        atomics=count(r"(ATOM|ATOMG|RED|REDG)\b"),
        instructions=len(operations),
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def compile_all(launches: Iterable[tuple[Launch, int]]) -> list[Report]:
    """Compile several launches, each for its architecture, on all cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda item: compile_launch(*item), launches))


def record(operation: CustomOpDef, *args: Any) -> list[Launch]:
    """Return what the CUDA implementation of an operation launches for these arguments."""
    with recorded() as launches:
        operation._backend_fns["cuda"](*args)
    return launches
