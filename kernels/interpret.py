"""Run ``@triton.jit`` kernels on CPU tensors, in a process that also compiles and launches them.

Triton's own interpreter has to be switched on before Triton is imported, and then nothing compiles
any more. Here it is switched on for the length of a ``with`` block, and made to do as a GPU does:

- bfloat16: matmuls and roundings are those of the hardware (Triton's interpreter multiplies the bit
  patterns and truncates). Any other arithmetic on bfloat16 is an error: a kernel that does it loses
  precision on a GPU as well.
- TF32: ``tl.dot`` sees 10 bits of mantissa; "tf32x3" is a sum of three such matmuls that restores
  the precision.
- Maximum and minimum of a number and NaN are the number, unless ``propagate_nan`` says otherwise.
- Memory: a load or store outside of the tensors that a launch was given is an error, and so is a
  race: an access to what another program of the launch has written, or a write to what another has
  read. On a GPU, programs run in no order.
"""

import math
import types
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from ssast.kernels.operation import import_kernels

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_MISSING = object()


class MemoryFault(IndexError):
    """A kernel accessed memory out of bounds, or raced another program."""


@contextmanager
def replaced(owner: object, **members: Any) -> Iterator[None]:
    """Replace attributes of a class or module for the length of a block."""
    before = {name: vars(owner).get(name, _MISSING) for name in members}
    for name, member in members.items():
        setattr(owner, name, member)
    try:
        yield
    finally:
        for name, member in before.items():
            delattr(owner, name) if member is _MISSING else setattr(owner, name, member)


# bfloat16 is a uint16 array in the interpreter.


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _cast(original: Any) -> Any:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        to_bf16 = target.scalar == tl.bfloat16
        if _is_bf16(source) == to_bf16:
            return original(self, source, target)
        if to_bf16:
            return _Handle(_round_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, _widen(source), target)

    return cast_impl


def _round_like_a_gpu(original: Any) -> Any:
    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            raise TypeError("a bfloat16 cast with a rounding mode is not interpreted")
        return original(self, source, target, mode)

    return create_fp_to_fp


def _refuse_bf16(name: str, original: Any) -> Any:
    def refused(self: Any, *operands: Any) -> Any:
        handles = (o for o in operands if isinstance(o, _Handle))
        if any(o.get_element_ty() == tl.bfloat16 and not o.dtype.is_ptr() for o in handles):
            raise TypeError(f"{name} in bfloat16: cast to float32 first")
        return original(self, *operands)

    return refused


def _refuse_bf16_reduction(original: Any) -> Any:
    def check_tensor(self: Any, operands: Any) -> Any:
        if any(_is_bf16(x.handle) for x in operands):
            raise TypeError("a reduction in bfloat16: cast to float32 first")
        return original(self, operands)

    return check_tensor


def _dot(original: Any) -> Any:
    def cut(x: np.ndarray) -> np.ndarray:  # what a tensor core reads of a float32
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    def near(x: np.ndarray) -> np.ndarray:  # cvt.rna.tf32
        return cut((x.view(np.uint32) + np.uint32(0x1000)).view(np.float32))

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        a, b = _widen(a), _widen(b)
        kind = str(precision).rpartition(".")[2].upper()
        if a.data.dtype != np.float32 or _is_bf16(d) or not kind.startswith("TF32"):
            return original(self, a, b, d, precision, imprecise)
        x, y = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
        if kind == "TF32X3":
            big_x, big_y = near(x), near(y)
            product = near(x - big_x) @ big_y + big_x @ near(y - big_y) + big_x @ big_y
        else:
            product = cut(x) @ cut(y)
        return _Handle(product + d.data, d.dtype.scalar)

    return create_dot


class _Memory:
    """Bytes that a launch may access, and the programs that have accessed them."""

    def __init__(self, arguments: Iterable[object]):
        extents: dict[int, tuple[int, int]] = {}
        for tensor in (a for a in arguments if isinstance(a, torch.Tensor) and a.numel()):
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            stop = start + (reach + 1) * tensor.element_size()
            storage = tensor.untyped_storage().data_ptr()
            low, high = extents.get(storage, (start, stop))
            extents[storage] = min(low, start), max(high, stop)
        self.extents = sorted(extents.values())
        self.starts = np.array([low for low, _ in self.extents], dtype=np.uint64)
        # -1: no program; -2 (readers): more than one.
        self.writers = [np.full(high - low, -1, np.int64) for low, high in self.extents]
        self.readers = [np.full(high - low, -1, np.int64) for low, high in self.extents]
        self.program = 0

    def places(self, pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> Iterator:
        """Yield (tensor, offsets in bytes) for the tensors that the pointers lie in."""
        pointers, mask = np.broadcast_arrays(pointers, mask.astype(bool))
        active = pointers[mask]
        owners = np.searchsorted(self.starts, active, side="right") - 1
        for owner in np.unique(owners):
            low, high = self.extents[owner] if owner >= 0 else (0, 0)
            offsets = active[owners == owner].astype(np.int64) - low
            if owner < 0 or offsets.max() + size > high - low:
                past = "before the first tensor" if owner < 0 else (
                    f"{offsets.max() + size - (high - low)} bytes past the end of a tensor"
                )  # fmt: skip
                raise MemoryFault(f"{what} {past}")
            yield owner, offsets

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        for owner, offsets in self.places(pointers, mask, size, "a load"):
            writers, readers = self.writers[owner][offsets], self.readers[owner]
            if ((writers != -1) & (writers != self.program)).any():
                raise MemoryFault("a program reads what another one has written")
            first = np.isin(readers[offsets], (-1, self.program))
            readers[offsets] = np.where(first, self.program, -2)

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        for owner, offsets in self.places(pointers, mask, size, "a store"):
            if len(np.unique(offsets)) < len(offsets):
                raise MemoryFault("a store writes one place twice")
            for before, what in ((self.writers, "written"), (self.readers, "read")):
                others = before[owner][offsets]
                if ((others != -1) & (others != self.program)).any():
                    raise MemoryFault(f"a program writes what another one has {what}")
            self.writers[owner][offsets] = self.program


def _guarded_memory(builder: Any) -> dict[str, Any]:
    load, store, place = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
    )

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.memory.load(pointers.data, mask.data, size)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self.memory.store(pointers.data, mask.data, size)
        return store(self, pointers, value, mask, *rest)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        self.memory.program = (x * ny + y) * nz + z
        return place(self, x, y, z)

    return {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "set_grid_idx": set_grid_idx,
    }


class _Language:
    """Stand-in for a function whose globals name what the interpreter has to patch."""

    __globals__: dict[str, Any] = {"tl": tl, "core": tl.core}  # noqa: RUF012


@contextmanager
def interpreter_mode() -> Iterator[None]:
    """Run ``kernel[grid](...)`` on CPU tensors in the block, one program after the other.

    Raises (from the launch):
        MemoryFault: The kernel reads or writes out of bounds, or depends on the order of programs.
        TypeError: The kernel does arithmetic in bfloat16.
    """
    rewritten: dict[Any, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if math.prod(grid) == 0:
            raise ValueError(f"{self.fn.__name__}: CUDA refuses an empty grid, {grid}")
        interpreter.interpreter_builder.memory = _Memory([*args, *kwargs.values()])
        try:
            interpreter.InterpretedFunction(self.fn).run(
                *args, grid=tuple(grid), warmup=warmup, **kwargs
            )
        except interpreter.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # a kernel calls a jit function
        if self.fn not in rewritten:  # not keyed by self: its hash walks the patched sources
            rewritten[self.fn] = interpreter.InterpretedFunction(self.fn).rewrite()
        return rewritten[self.fn](*args, **kwargs)

    def bind(self: Any, instance: Any, owner: Any = None) -> Any:  # x.max() of a tensor
        return self if instance is None else types.MethodType(self, instance)

    refused = ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt")
    import_kernels()  # in this mode @triton.jit would make functions that only interpret
    with ExitStack() as stack:
        for context in (
            replaced(JITFunction, run=run, __call__=call, __get__=bind),
            replaced(
                _Builder,
                create_dot=_dot(_Builder.create_dot),
                cast_impl=_cast(_Builder.cast_impl),
                create_fp_to_fp=_round_like_a_gpu(_Builder.create_fp_to_fp),
                create_maxnumf=lambda self, a, b: self.binary_op(a, b, np.fmax),
                create_minnumf=lambda self, a, b: self.binary_op(a, b, np.fmin),
                **{name: _refuse_bf16(name, getattr(_Builder, name)) for name in refused},
                **_guarded_memory(_Builder),
            ),
            replaced(
                interpreter.ReduceScanOpInterface,
                check_tensor=_refuse_bf16_reduction(interpreter.ReduceScanOpInterface.check_tensor),
            ),
            triton.knobs.runtime.scope(),
            np.errstate(all="ignore"),  # a GPU does not warn either
        ):
            stack.enter_context(context)
        triton.knobs.runtime.interpret = True
        scope = interpreter._patch_lang(_Language)
        if scope is not None:
            stack.callback(scope.restore)
        yield
