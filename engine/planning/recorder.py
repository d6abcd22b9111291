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

Caches are not modelled. What a kernel reads twice counts twice only where :data:`_TRAFFIC` says so.
"""

import math
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from ssast.kernels import roofline
from ssast.kernels.interpret import replaced
from ssast.kernels.launch import assume_architecture
from ssast.kernels.operation import NAMESPACE, runs_on_cuda

META = torch.device("meta")
_aten = torch.ops.aten
_ALIGNMENT = 512  # bytes, of PyTorch's allocator on CUDA
_CHUNK, _BLOCKS = 65536, 320  # elements of a block and blocks of a launch of _foreach_ operations


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


class Traffic(NamedTuple):
    """Bytes of an operation, and the kernels it launches."""

    read: int
    written: int
    kernels: int = 1


def touched(x: Tensor) -> int:
    """Return the bytes of a tensor's elements, those of an expanded dimension once."""
    if x.numel() == 0:
        return 0
    sizes = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


def _all(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all(item)


def _sum(*values: Any) -> int:
    return sum(map(touched, _all(values)))


def _gather(source: Tensor, index: Any, out: Tensor) -> Traffic:
    taken = min(out.numel() * source.element_size(), touched(source))
    return Traffic(taken + _sum(index), touched(out))


def _put(target: Tensor, index: Tensor, source: Any, *, adds: bool) -> Traffic:
    count = index.numel()
    put = count * target.element_size()
    return Traffic(_sum(index, source) + adds * put, put)


def _layer_norm_backward(args: Sequence[Any], out: Any) -> Traffic:
    # One kernel for the input's gradient, one for those of weight and bias; both read all of it.
    grad, x, _, mean, rstd, weight, _ = args[:7]
    return Traffic(2 * _sum(grad, x, mean, rstd) + _sum(weight), _sum(out), 2)


def _part_of_zeros(args: Sequence[Any], out: Tensor) -> Traffic:
    return Traffic(_sum(args[0]), touched(out) + _sum(args[0]), 2)


def _fused_adam(args: Sequence[Any], out: Any) -> Traffic:
    weights, gradients, first, second, _, steps = args[:6]
    moved = _sum(weights, first, second)
    read = moved + _sum(gradients, steps)
    return Traffic(read, moved, _foreach_kernels(weights))


def _foreach_kernels(tensors: Sequence[Tensor]) -> int:
    return max(1, math.ceil(sum(math.ceil(x.numel() / _CHUNK) for x in tensors) / _BLOCKS))


# Of operations that touch other bytes than all of their inputs and outputs, or launch more kernels
# than one: (arguments, result) -> Traffic. Sources: ATen's CUDA kernels, PyTorch 2.13.
_TRAFFIC: dict[str, Callable[[Sequence[Any], Any], Traffic]] = {
    "gather": lambda a, out: _gather(a[0], a[2], out),
    "index_select": lambda a, out: _gather(a[0], a[2], out),
    "index": lambda a, out: _gather(a[0], a[1], out),
    "embedding": lambda a, out: _gather(a[0], a[1], out),
    "scatter_": lambda a, out: _put(a[0], a[2], a[3], adds=False),
    "scatter_add_": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    "scatter_reduce_": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    # Autograd takes the form that is not in place only because it is watched.
    "scatter_add": lambda a, out: _put(a[0], a[2], a[3], adds=True),
    "native_layer_norm_backward": _layer_norm_backward,
    "slice_backward": _part_of_zeros,
    "select_backward": _part_of_zeros,
    "_fused_adam_": _fused_adam,
    "_fused_adamw_": _fused_adam,
}
_FILLS = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "arange", "scalar_tensor",
}  # fmt: skip
_WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # read no target
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_HOST_READS = {"nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
# Kernels of what is no single one: in flash attention's backward pass the row sums, the gradients,
# and the queries' gradient from float32; in a sort of rows the radix sort's passes.
_KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "sort": 3,
}


# Of Triton kernels, whose matmuls PyTorch does not know.
_OUR_FLOPS: dict[str, Callable[[Sequence[Any]], float]] = {
    "patch_embed": lambda a: 2.0 * a[7].numel() * a[1].numel(),  # visible patches, weight
    "patch_embed_backward": lambda a: 2.0 * a[4].numel() * a[2].numel(),
    "info_nce": lambda a: roofline.info_nce(*a[0].shape, itemsize=1).flops,
}


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any
) -> Tensor:
    """Stand in for PyTorch's attention, of which ``meta`` has matmuls and a softmax alone."""
    if attn_mask is None and q.element_size() == 2:
        return _aten._scaled_dot_product_flash_attention(q, k, v)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


class Recorder(TorchDispatchMode):
    """Records the operations on a device while it is entered.

    with Recorder() as recorder:
        recorder.phase = "forward"
        model(torch.empty(8, 16, device="meta"))

    Args:
        device: Type of the device whose operations count; "cpu" records real ones.
        architecture: Of the GPU whose kernels' launchers are run: 80 for sm_80, 90 for sm_90 ...

    Attributes:
        phase: Part of the step that operations count to; to be set.
        recording: What has been seen.
    """

    def __init__(self, device: str = "meta", architecture: int = 90):
        super().__init__()
        self.recording = Recording()
        self._device, self._architecture = device, architecture
        self.phase, self._operation = "", ""
        self._held: dict[int, tuple[int, str]] = {}  # bytes and part of each storage
        self._in_use: dict[str, int] = {}
        self._unwritten: set[int] = set()
        self._stack, self._depth = ExitStack(), 0

    def __enter__(self) -> Self:
        """Begin to record, or go on below an operation of ours."""
        if not self._depth:
            self._stack.enter_context(replaced(JITFunction, run=self._triton()))
            self._stack.enter_context(assume_architecture(self._architecture))
            self._stack.enter_context(
                replaced(torch.nn.functional, scaled_dot_product_attention=_fused_attention)
            )
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End the recording."""
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._stack.close()

    def hold(self, part: str, tensors: Any) -> None:
        """Count the memory of tensors under a name, in place of the phase they were made in."""
        for x in _all(tensors):
            self._keep(x, part)

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        self.recording.waits.append(Wait(what, _caller(), self.phase))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record it."""
        kwargs = kwargs or {}
        name = func._opname
        if func.namespace == NAMESPACE and self._device != "cpu":
            return self._run_ours(name, args, kwargs)
        inputs = [x for x in _all([args, list(kwargs.values())])]
        on_device = [x for x in inputs if self._counts(x)]
        if on_device:
            read, result = self._read_by_host(name, func, args, kwargs, on_device)
            if read:
                return result
        out = func(*args, **kwargs)
        results = [x for x in _all(out) if self._counts(x)]
        if not results and not on_device:
            return out
        storages = {_key(x) for x in on_device}
        fresh = [x for x in results if _key(x) not in storages]
        for x in fresh:
            self._keep(x, self.phase)
        if name in _EMPTY:
            self._unwritten.update(_key(x) for x in results)
        elif fresh or func._schema.is_mutable:
            self._record(func, name, args, kwargs, out)
        return out

    def _counts(self, x: Tensor) -> bool:
        return x.device.type == self._device

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        traffic, targets = self._traffic(func, name, args, kwargs, out)
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self._unwritten.difference_update(_key(x) for x in targets)
        self._note(name, traffic, flops, max((x.numel() for x in targets), default=0))

    def _traffic(
        self, func: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any
    ) -> tuple[Traffic, list[Tensor]]:
        """Return the bytes of an operation, and the tensors that it writes."""
        sources, targets = list[Tensor](), list[Tensor]()
        read_targets = name not in _WRITES
        values = [*args, *(kwargs[a.name] for a in func._schema.arguments if a.name in kwargs)]
        given = [a for i, a in enumerate(func._schema.arguments) if i < len(args)]
        given += [a for a in func._schema.arguments[len(args) :] if a.name in kwargs]
        for argument, value in zip(given, values, strict=True):
            tensors = [x for x in _all(value) if self._counts(x)]
            is_target = argument.alias_info is not None and argument.alias_info.is_write
            (targets if is_target else sources).extend(tensors)
            read_targets &= not argument.is_out
        known = {id(x) for x in targets}
        results = [x for x in _all(out) if self._counts(x) and id(x) not in known]
        written = [*targets, *results]
        if name in _TRAFFIC:
            return _TRAFFIC[name](args, out), written
        if name in _FILLS:
            return Traffic(0, _sum(written)), written
        read = _sum(sources) + (_sum(targets) if read_targets else 0)
        kernels = _KERNELS.get(name, 1)
        if name.startswith("_foreach_"):
            kernels = _foreach_kernels(list(_all(args[0])))
        return Traffic(read, _sum(written), kernels), written

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

    def _run_ours(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run what a CUDA device would run for an operation of ours."""
        before, self._operation = self._operation, self._operation or name
        first = len(self.recording.launches)
        try:
            with self:
                return runs_on_cuda(name)(*args, **kwargs)
        finally:
            self._operation = before
            launches = self.recording.launches
            if name in _OUR_FLOPS and len(launches) > first:
                launches[first] = replace(launches[first], flops=_OUR_FLOPS[name](args))

    def _triton(self) -> Callable[..., None]:
        """Return what stands in for ``JITFunction.run``: it records the launch of a kernel."""

        def run(function: JITFunction, *args: Any, **kwargs: Any) -> None:
            tensors = {_key(x): x for x in _all([args, list(kwargs.values())]) if self._counts(x)}
            written = [x for key, x in tensors.items() if key in self._unwritten]
            read = [x for key, x in tensors.items() if key not in self._unwritten]
            self._unwritten.difference_update(tensors)
            width = max((x.numel() for x in written), default=0)
            self._note(function.__name__, Traffic(_sum(read), _sum(written)), 0, width)

        return run

    def _read_by_host(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], on_device: list[Tensor]
    ) -> tuple[bool, Any]:
        """Note a read by the host; return whether it was one, and a result in its place."""
        if self._device == "cpu":
            return False, None
        if name == "_local_scalar_dense":
            self.wait("a value is read")
            dtype = args[0].dtype
            return True, False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if name in _HOST_READS:
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
    """Return where the program is, outside of PyTorch and of this file."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        if name != __file__ and "/torch/" not in name and not name.startswith("<"):
            return f"{name}:{frame.lineno} {frame.name}"
    return "?"
