"""How an operation of ours becomes one of PyTorch's, on every device.

An operation is described once, by its implementation in plain torch, whose annotations are the
schema. It runs on every device that has no kernel of its own, and in place of a kernel wherever
that one cannot: kernels are for floats of up to 32 bits, and a launch needs some data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

Function = Callable[..., Any]
NAMESPACE = "ssast"
_on_cuda: dict[str, Function] = {}


def custom_op(
    name: str,
    implementation: Function,
    *,
    fake: Function,
    cpu: Function | None = None,
    cuda: Function | None = None,
) -> CustomOpDef:
    """Define ``torch.ops.ssast.<name>``.

    Args:
        name: Name in the namespace ``ssast``.
        implementation: The operation in plain torch, for any device and dtype; fully annotated.
        fake: Returns empty tensors of the results' shapes and dtypes, for the same arguments.
        cpu: Faster implementation for a CPU, with the same arguments.
        cuda: Launches the Triton kernels, with the same arguments.
    """
    operation = torch.library.custom_op(f"{NAMESPACE}::{name}", implementation, mutates_args=())
    operation.register_fake(fake)
    for device, kernel in (("cpu", cpu), ("cuda", cuda)):
        if kernel is not None:
            operation.register_kernel(device, _with_fallback(kernel, implementation))
    _on_cuda[name] = cuda or implementation
    return operation


def runs_on_cuda(name: str) -> Function:
    """Return what ``torch.ops.ssast.<name>`` runs on a CUDA device, with the same arguments."""
    return _on_cuda[name]


def _with_fallback(kernel: Function, implementation: Function) -> Function:
    def run(*args: Any) -> Any:
        is_double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        return (implementation if is_double or args[0].numel() == 0 else kernel)(*args)

    return run
