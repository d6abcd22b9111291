"""The CUDA implementation of an operation, run on CPU tensors by the interpreter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.library import CustomOpDef

from ssast.kernels.interpret import interpreter_mode, replaced
from ssast.kernels.launch import assume_architecture


@contextmanager
def on_triton(*operations: CustomOpDef, architecture: int = 80) -> Iterator[None]:
    """In the block these operations run their Triton kernels, backward passes included.

    Fresh memory holds NaN (integers: the largest one), so that an element that a kernel forgets
    to write is seen.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        for operation in operations:
            kernels = operation._backend_fns
            other = {device: kernels["cuda"] for device in kernels}
            stack.enter_context(replaced(operation, _backend_fns=other))
        stack.enter_context(assume_architecture(architecture))
        stack.enter_context(interpreter_mode())
        torch.use_deterministic_algorithms(True)  # this is what fills fresh memory
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        yield
