"""What a launch needs to know besides its tensors: the architecture that it is for."""

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
    """The architecture that launches on tensors without a GPU are prepared for, in this block."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90 ...; block sizes depend on it."""
    if device.type != "cuda":
        return _assumed.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current GPU: make that the one of the first argument, a tensor."""

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return launcher(*args, **kwargs)

    return launch
