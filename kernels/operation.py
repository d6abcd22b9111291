"""How an operation of ours becomes one of PyTorch's, on every device.

An operation is described once, by its implementation in plain torch, whose annotations are the
schema. It runs on every device that has no kernel of its own, and in place of a kernel wherever
that one cannot: kernels are for floats of up to 32 bits, and a launch needs some data.

Where a derivative is asked for that the operation has no formula for, its plain form runs instead,
which PyTorch differentiates: forward-mode derivatives, ``torch.func`` (grad, vmap, jvp, hessian),
the derivative of a backward pass, and that of an input which is data in training.
"""

import importlib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd.forward_ad import unpack_dual
from torch.library import CustomOpDef

from ssast.kernels.autocast import DEVICES, RULES, Rule, cast_inputs

Function = Callable[..., Any]
NAMESPACE = "ssast"
_kernels: dict[tuple[str, str], Function] = {}
_kernel_modules: set[str] = set()


def custom_op(
    name: str,
    implementation: Function,
    *,
    fake: Function,
    autocast: Rule,
    keep: Sequence[str] = (),
    plain: Function | None = None,
    formula_for: Sequence[str] = (),
    cpu: Function | None = None,
    cuda: Function | None = None,
) -> CustomOpDef:
    """Define ``torch.ops.ssast.<name>``.

    Args:
        name: Name in the namespace ``ssast``.
        implementation: The operation in plain torch, for any device and dtype; fully annotated.
        fake: Returns empty tensors of the results' shapes and dtypes, for the same arguments.
        autocast: What it computes in under autocast, see :mod:`ssast.kernels.autocast`.
        keep: Arguments that autocast does not cast.
        plain: The operation out of place, in torch that PyTorch differentiates, with the same
            arguments; the implementation if None.
        formula_for: Arguments whose gradients ``register_autograd`` gives.
        cpu: Faster implementation for a CPU, with the same arguments.
        cuda: Launches the Triton kernels, with the same arguments; see :func:`on_first_call`.
    """
    operation = torch.library.custom_op(f"{NAMESPACE}::{name}", implementation, mutates_args=())
    operation.register_fake(fake)
    operation._backend_fns[None] = _untraced(implementation)
    for device, kernel in (("cpu", cpu), ("cuda", cuda)):
        if kernel is not None:
            operation.register_kernel(device, kernel)
            operation._backend_fns[device] = _untraced(_with_fallback(kernel, implementation))
    _kernels[name, "cpu"] = cpu or implementation
    _kernels[name, "cuda"] = cuda or implementation
    RULES[name] = autocast
    places = {x.name: i for i, x in enumerate(operation._opoverload._schema.arguments)}
    _register_autocast(operation, autocast, {places[x] for x in keep})
    _register_plain(operation, plain or implementation, {places[x] for x in formula_for})
    return operation


def on_first_call(module: str, name: str) -> Function:
    """Return a function of a module of kernels, which is imported when it is first called.

    Triton and its kernels take a fifth of a second to import, which a CPU need not spend.

    Args:
        module: Name of the module in ``ssast.kernels``.
        name: Name of the function.
    """
    _kernel_modules.add(module)

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"ssast.kernels.{module}"), name)(*args)

    return run


def import_kernels() -> None:
    """Import the modules of all functions of :func:`on_first_call`."""
    for module in _kernel_modules:
        importlib.import_module(f"ssast.kernels.{module}")


def runs_on(name: str, device: Literal["cpu", "cuda"]) -> Function:
    """Return what ``torch.ops.ssast.<name>`` runs on a kind of device, with the same arguments."""
    return _kernels[name, device]


def is_transformed(*args: Any) -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation follows one of the tensors."""
    if torch.compiler.is_dynamo_compiling():  # it follows the transforms by itself
        return False
    return any(
        isinstance(x, Tensor)
        and (is_functorch_wrapped_tensor(x) or unpack_dual(x).tangent is not None)
        for x in args
    )


def _with_fallback(kernel: Function, implementation: Function) -> Function:
    def run(*args: Any) -> Any:
        is_double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        return (implementation if is_double or args[0].numel() == 0 else kernel)(*args)

    return run


def _untraced(function: Function) -> Function:
    """Keep Dynamo out of a function, as ``torch.library`` does, but do not import it for that.

    Its import takes a second, which a program that compiles nothing need not spend.
    """
    untraced: Function | None = None

    def run(*args: Any) -> Any:
        nonlocal untraced
        if untraced is None and "torch._dynamo" in sys.modules:
            untraced = torch.compiler.disable(function)
        return (untraced or function)(*args)

    return run


def _register_autocast(operation: CustomOpDef, rule: Rule, keep: Collection[int]) -> None:
    for device in DEVICES:
        key = f"Autocast{device.upper()}"
        off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(_: Any, *args: Any, device: str = device, off: Any = off) -> Any:
            cast = cast_inputs(rule, args, device, keep)
            with torch._C._ExcludeDispatchKeyGuard(off):
                return operation._opoverload(*cast)

        operation._lib.impl(operation._name, run, key, with_keyset=True)


def _register_plain(operation: CustomOpDef, plain: Function, formula_for: Collection[int]) -> None:
    formula = make_autograd_impl(operation._opoverload, operation)

    def run(keyset: Any, *args: Any) -> Any:
        data_needs_grad = torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad and i not in formula_for
            for i, x in enumerate(args)
        )
        if data_needs_grad or is_transformed(*args):
            return plain(*args)
        return formula(keyset, *args)

    for device in ("CPU", "CUDA", "Meta"):
        operation._lib.impl(operation._name, run, f"Autograd{device}", with_keyset=True)
    operation._lib.impl(operation._name, plain, "FuncTorchBatched")
