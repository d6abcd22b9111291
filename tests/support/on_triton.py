"""The CUDA implementation of an operation, run on CPU tensors by the interpreter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.library import CustomOpDef

from ssast.kernels.interpret import interpreter_mode, replaced
from ssast.kernels.launch import assume_architecture

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# In torch or, by the interpreter, in Triton on the CPU; on a GPU.
PLACES = ["torch", "interpreted", pytest.param("cuda", marks=needs_gpu)]


@contextmanager
def running_on(place: str, *operations: CustomOpDef) -> Iterator[str]:
    """Run these operations on one of PLACES in the block; yields the device of the tensors."""
    if place == "interpreted":
        with on_triton(*operations):
            yield "cpu"
    else:
        yield "cuda" if place == "cuda" else "cpu"


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
