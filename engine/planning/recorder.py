"""Operations of a device, recorded on tensors without data.

A :class:`Recorder` runs a program on the device ``meta`` and notes, for each operation that would
launch a kernel on CUDA, the bytes that it reads and writes and its FLOPs; the memory in use; and
every place where the host would wait for the device.

    bytes      each element of an input read once, of an output written once; an expanded tensor
               (stride 0) counts its storage, a gather what it takes, a scatter what it puts
    in place   read and written; copy_, fill_ and out= are written only
    nothing    views, empty tensors, and what stays on the host
    ours       the launcher of an operation's Triton kernels runs on ``meta`` too: each kernel is
               one launch, which writes the arguments that were empty and reads the others
    attention  one operation, as the fused backends are (Dao 2023), with its logsumexp
    on a CPU   the operations that a CPU would run, ours in plain torch; nobody waits

Caches are not modelled. What a kernel reads twice counts twice only where traffic.py says so.
"""

import math
import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from ssast.engine.planning.traffic import (
    CPU_AS_ONE,
    CPU_TRAFFIC,
    EMPTY,
    FILLS,
    HOST_READS,
    IN_BLOCKS,
    KERNELS,
    OUR_FLOPS,
    PYTORCH_FLOPS,
    TRAFFIC,
    WRITES,
    Traffic,
    foreach_kernels,
    tensors_in,
    total_bytes,
)
from ssast.kernels import attention
from ssast.kernels.efficient_attention import efficient_attention
from ssast.kernels.interpret import replaced
from ssast.kernels.launch import assume_architecture
from ssast.kernels.operation import NAMESPACE, runs_on

META = torch.device("meta")
_aten = torch.ops.aten
_ROOT = str(Path(__file__).parents[2]) + "/"
_OWN = {__file__, str(Path(__file__).parents[1] / "parallel" / "meta_accelerator.py")}
_ALIGNMENT = 512  # bytes, of PyTorch's allocator on CUDA


@dataclass(frozen=True)
class Launch:
    """One operation on the device.

    Attributes:
        name: Its name, such as "mm", or that of a Triton kernel.
        phase: Part of the step.
        operation: Name of the operation of ours that it is part of; "" if it is of none.
        node: Name of the autograd node that is evaluated; "" outside of a backward pass.
        kernels: Launches.
        read: Bytes.
        written: Bytes.
        flops: Of its matmuls.
        width: Elements of the largest tensor it writes.
    """

    name: str
    phase: str
    operation: str
    node: str
    kernels: int
    read: int
    written: int
    flops: float
    width: int


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device."""

    what: str
    where: str
    """File, line and function."""

    phase: str


@dataclass
class Recording:
    """What a :class:`Recorder` has seen.

    Attributes:
        launches: All operations, in order.
        waits: All waits of the host, in order.
        peak: The most bytes that were in use.
        at_peak: These, by what they were held as or by the phase in which they were allocated.
    """

    launches: list[Launch] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Tensor:
    """Stand in for PyTorch's attention, of which ``meta`` has matmuls and a softmax alone."""
    if attn_mask is None and q.element_size() == 2:
        return _aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if attn_mask is None and q.shape == k.shape:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return efficient_attention(q, k, v).transpose(1, 2)
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def _fused_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Tensor:
    mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=q.dtype)
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]


class Recorder(TorchDispatchMode):
    """Records the operations on a device while it is entered.

    with Recorder() as recorder:
        recorder.phase = "forward"
        model(torch.empty(8, 16, device="meta"))

    Args:
        device: Type of the device whose operations count; "cpu" records real ones.
        architecture: Of the GPU whose kernels' launchers are run: 80 for sm_80, 90 for sm_90 ...
        cpu_attention: Backend of attention on the CPU whose operations are run on "meta"; None: a
            GPU's are.

    Attributes:
        phase: Part of the step that operations count to; to be set.
        count: What the host finds where it reads a number; to be set.
        recording: What has been seen.
    """

    def __init__(
        self,
        device: str = "meta",
        architecture: int = 90,
        cpu_attention: attention.Backend | None = None,
    ):
        super().__init__()
        self._cpu_attention = cpu_attention
        self.recording = Recording()
        self._device, self._architecture = device, architecture
        self.phase, self.count, self._operation = "", 1, ""
        self._held: dict[int, tuple[int, str]] = {}  # bytes and part of each storage
        self._in_use: dict[str, int] = {}
        self._unwritten: set[int] = set()
        self._stack, self._depth = ExitStack(), 0

    def __enter__(self) -> Self:
        """Begin to record, or go on below an operation of ours."""
        if not self._depth:
            fused = _fused_attention
            if self._cpu_attention is None:
                self._stack.enter_context(replaced(JITFunction, run=self._triton()))
                self._stack.enter_context(assume_architecture(self._architecture))
            else:
                backend, fused = self._cpu_attention, _fused_on_cpu
                self._stack.enter_context(replaced(attention, attention_backend=lambda *_: backend))
            self._stack.enter_context(
                replaced(torch.nn.functional, scaled_dot_product_attention=fused)
            )
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End the recording."""
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._stack.close()

    def restart(self) -> Recording:
        """Begin anew, and return what was recorded; memory that is in use stays so."""
        recording, self.recording = self.recording, Recording()
        return recording

    def hold(self, part: str, tensors: Any) -> None:
        """Count the memory of tensors under a name, in place of the phase they were made in."""
        for x in tensors_in(tensors):
            self._keep(x, part)

    def forget(self, tensors: Any) -> None:
        """Do not count the memory of tensors."""
        for x in tensors_in(tensors):
            if _key(x) in self._held:
                self._in_use[self._held[_key(x)][1]] -= self._held[_key(x)][0]
                self._held[_key(x)] = 0, self._held[_key(x)][1]

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        if self._cpu_attention is None:
            self.recording.waits.append(Wait(what, _caller(), self.phase))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record it."""
        kwargs = kwargs or {}
        name = func._opname
        is_ours = func.namespace == NAMESPACE and self._operation != name
        if is_ours and self._device != "cpu":
            return self._run_ours(func, args, kwargs)
        if self._cpu_attention is not None:  # inside ours: of flatten or softmax, what they call
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        inputs = [x for x in tensors_in([args, list(kwargs.values())])]
        on_device = [x for x in inputs if self._counts(x)]
        if on_device:
            read, result = self._read_by_host(name, func, args, kwargs, on_device)
            if read:
                return result
        out = func(*args, **kwargs)
        results = [x for x in tensors_in(out) if self._counts(x)]
        if not results and not on_device:
            return out
        storages = {_key(x) for x in on_device}
        fresh = [x for x in results if _key(x) not in storages]
        for x in fresh:
            self._keep(x, self.phase)
        if name in EMPTY:
            self._unwritten.update(_key(x) for x in results)
        elif fresh or func._schema.is_mutable:
            self._record(func, name, args, kwargs, out)
        return out

    def _counts(self, x: Tensor) -> bool:
        return x.device.type == self._device

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        traffic, targets = self._traffic(func, name, args, kwargs, out)
        if name in PYTORCH_FLOPS:
            flops = PYTORCH_FLOPS[name](args, out)
        else:
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self._unwritten.difference_update(_key(x) for x in targets)
        self._note(name, traffic, flops, max((x.numel() for x in targets), default=0))

    def _traffic(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any
    ) -> tuple[Traffic, list[Tensor]]:
        """Return the bytes of an operation, and the tensors that it writes."""
        sources, targets = list[Tensor](), list[Tensor]()
        read_targets = name not in WRITES
        values = [*args, *(kwargs[a.name] for a in func._schema.arguments if a.name in kwargs)]
        given = [a for i, a in enumerate(func._schema.arguments) if i < len(args)]
        given += [a for a in func._schema.arguments[len(args) :] if a.name in kwargs]
        for argument, value in zip(given, values, strict=True):
            tensors = [x for x in tensors_in(value) if self._counts(x)]
            is_target = argument.alias_info is not None and argument.alias_info.is_write
            (targets if is_target else sources).extend(tensors)
            read_targets &= not argument.is_out
        known = {id(x) for x in targets}
        results = [x for x in tensors_in(out) if self._counts(x) and id(x) not in known]
        written = [*targets, *results]
        on_cpu = self._cpu_attention is not None
        special = CPU_TRAFFIC if on_cpu else TRAFFIC
        count = len(list(tensors_in(args[0]))) if name.startswith(("_foreach_", "_fused_")) else 1
        if name in special:
            traffic = special[name](args, out)
            return traffic._replace(kernels=count) if on_cpu else traffic, written
        if name in FILLS:
            return Traffic(0, total_bytes(written)), written
        read = total_bytes(sources) + (total_bytes(targets) if read_targets else 0)
        kernels = count if on_cpu else KERNELS.get(name, 1)
        if name.startswith("_foreach_") and not on_cpu:
            kernels = foreach_kernels(list(tensors_in(args[0])))
        return Traffic(read, total_bytes(written), kernels), written

    def _note(self, name: str, traffic: Traffic, flops: float, width: int) -> None:
        node = torch._C._current_autograd_node()
        self.recording.launches.append(
            Launch(
                name,
                self.phase,
                self._operation,
                "" if node is None else node.name(),
                traffic.kernels,
                traffic.read,
                traffic.written,
                flops,
                width,
            )
        )

    def _run_ours(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run what the device would run for an operation of ours."""
        device: Literal["cpu", "cuda"] = "cuda" if self._cpu_attention is None else "cpu"
        name = func._opname
        before, self._operation = self._operation, self._operation or name
        first = len(self.recording.launches)
        try:
            with self:
                is_one = device == "cpu" and name in CPU_AS_ONE
                out = (func if is_one else runs_on(name, device))(*args, **kwargs)
        finally:
            self._operation = before
        launches = self.recording.launches
        if name in IN_BLOCKS and device == "cpu":
            self._join_blocks(name, first, Traffic(total_bytes(args), total_bytes(out)))
        elif name in OUR_FLOPS and device == "cuda" and len(launches) > first:
            launches[first] = replace(launches[first], flops=OUR_FLOPS[name](args))
        return out

    def _join_blocks(self, name: str, first: int, traffic: Traffic) -> None:
        """Make one operation of those whose results stay in the cache, from a launch on."""
        launches = self.recording.launches
        blocks = [x for x in launches[first:] if x.name in IN_BLOCKS[name]]
        launches[first:] = [x for x in launches[first:] if x.name not in IN_BLOCKS[name]]
        if blocks:
            flops, width = sum(x.flops for x in blocks), max(x.width for x in blocks)
            joined = replace(blocks[0], name=name, operation=name, kernels=len(blocks))
            moved = replace(joined, read=traffic.read, written=traffic.written)
            launches.append(replace(moved, flops=flops, width=width))

    def _triton(self) -> Callable[..., None]:
        """Return what stands in for ``JITFunction.run``: it records the launch of a kernel."""

        def run(function: JITFunction, *args: Any, **kwargs: Any) -> None:
            tensors = {
                _key(x): x for x in tensors_in([args, list(kwargs.values())]) if self._counts(x)
            }
            written = [x for key, x in tensors.items() if key in self._unwritten]
            read = [x for key, x in tensors.items() if key not in self._unwritten]
            self._unwritten.difference_update(tensors)
            width = max((x.numel() for x in written), default=0)
            self._note(
                function.__name__, Traffic(total_bytes(read), total_bytes(written)), 0, width
            )

        return run

    def _read_by_host(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], on_device: list[Tensor]
    ) -> tuple[bool, Any]:
        """Note a read by the host; return whether it was one, and a result in its place."""
        if self._device == "cpu":
            return False, None
        if name == "_local_scalar_dense":
            self.wait("a value is read")
            value = self.count if args[0].itemsize > 1 else 0  # flags are not set
            return True, float(value) if args[0].dtype.is_floating_point else value
        if name in HOST_READS:
            self.wait(f"the size of the result of {name} is read")
            count = args[0].numel()
            if name == "nonzero":
                return True, args[0].new_empty(count, args[0].ndim, dtype=torch.int64)
            if name == "masked_select":
                return True, args[0].new_empty(count)
            return False, None
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            return self._index_by_mask(func, args, kwargs)
        if name == "_to_copy" and torch.device(kwargs.get("device") or META).type == "cpu":
            if not kwargs.get("non_blocking"):
                self.wait("a copy to the host")
            source = args[0]
            dtype = kwargs.get("dtype") or source.dtype
            return True, torch.zeros(source.shape, dtype=dtype, device="cpu")
        if name == "copy_" and args[0].device.type == "cpu":
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.wait("a copy to the host")
            return True, args[0]
        return False, None

    def _index_by_mask(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[bool, Any]:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return False, None
        self.wait("the number of elements of a mask is read")
        indices: list[Tensor | None] = []
        for x in args[1]:
            if x is None or x.dtype not in (torch.bool, torch.uint8):
                indices.append(x)
            else:
                indices += [x.new_empty(x.numel(), dtype=torch.int64) for _ in range(x.ndim)]
        with self:
            return True, func(args[0], indices, *args[2:], **kwargs)

    def _keep(self, x: Tensor, part: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._held:
            size, old = self._held[key]
            self._in_use[old] -= size
        else:
            size = math.ceil(storage.nbytes() / _ALIGNMENT) * _ALIGNMENT
            weakref.finalize(storage, self._free, key).atexit = False
        self._held[key] = size, part
        self._in_use[part] = self._in_use.get(part, 0) + size
        total = sum(self._in_use.values())
        if total > self.recording.peak:
            self.recording.peak = total
            self.recording.at_peak = {name: size for name, size in self._in_use.items() if size}

    def _free(self, key: int) -> None:
        size, part = self._held.pop(key)
        self._in_use[part] -= size
        self._unwritten.discard(key)


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _caller() -> str:
    """Return where the program is, outside of PyTorch, of this file and of the accelerator."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        if name not in _OWN and "/torch/" not in name and not name.startswith("<"):
            package = name.rpartition("/site-packages/")[2].removeprefix(_ROOT)
            return f"{package}:{frame.lineno} {frame.name}"
    return "?"
