"""What a launch needs to know besides its tensors: the architecture that it is for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

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
