"""The architecture and the device of a launch."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_assumed: ContextVar[int] = ContextVar("architecture", default=80)


@contextmanager
def assume_architecture(architecture: int) -> Iterator[None]:
    """Set the architecture for launches on tensors that are not on a GPU, in this block."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device: torch.device) -> int:
    """Return 80 for sm_80, 90 for sm_90 ...; block sizes depend on it."""
    if device.type != "cuda":
        return _assumed.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Make the GPU of the first argument, a tensor, the current one: Triton launches there."""

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launcher(*args, **kwargs)

    return launch
