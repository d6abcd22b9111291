"""DeepSpeed's view of a device on which tensors have no data, for a step that computes nothing.

The engine then runs the operations that it runs on CUDA, with streams and events that do nothing,
or those that it runs on a CPU.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ssast.kernels.interpret import replaced


@contextmanager
def meta_accelerator(wait: Callable[[str], None], *, cpu: bool = False) -> Iterator[None]:
    """Let DeepSpeed take the device "meta" for a GPU, or for a CPU.

    Args:
        wait: Called where the host would wait for a GPU.
        cpu: Whether it is a CPU.
    """
    from ssast.engine.parallel.deepspeed_engine import _import_deepspeed

    _import_deepspeed()
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Nothing:
        """A stream or an event, on which nothing happens."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def _nothing(self, *args: Any) -> None: ...

        wait_stream = wait_event = record = record_event = wait = _nothing

        def synchronize(self) -> None:
            wait("a stream or an event is awaited")

        def query(self) -> bool:
            return True

    class Meta(CPU_Accelerator):
        """What the accelerator for CPUs says, on the device "meta"."""

        def device_name(self, device_index: int | None = None) -> str:
            return "meta"

        def current_device_name(self) -> str:
            return "meta"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device("meta")

        current_device = device

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.is_meta

        def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
            return tensor

        def create_op_builder(self, op_name: str) -> Any:
            # With a GPU in the machine it would be compiled: 75 s of g++, for collectives of CPUs.
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    class MetaGpu(Meta):
        """What the accelerator for CUDA says, on the device "meta"."""

        Stream = Event = Nothing

        def is_synchronized_device(self) -> bool:
            return False

        def resolves_data_dependency(self) -> bool:
            return False

        def stream(self, stream: Any) -> Any:
            return nullcontext()

        def current_stream(self, device_index: int | None = None) -> Any:
            return Nothing()

        default_stream = current_stream

        def synchronize(self, device_index: int | None = None) -> None:
            wait("all work of the device is awaited")

    gc.collect()  # an engine that was dropped waits for its device when it is collected
    before = get_accelerator()
    set_accelerator(Meta() if cpu else MetaGpu())
    with (
        warnings.catch_warnings(),
        replaced(torch.Tensor, record_stream=lambda tensor, stream: None),
    ):
        warnings.filterwarnings("ignore", message="Set timeout is now only supported")
        try:
            yield
        finally:
            set_accelerator(before)
