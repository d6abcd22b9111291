"""A GPU without data: fake CUDA tensors, whose operations check that all inputs are there."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)
_to, aten = torch.Tensor.to, torch.ops.aten


def _move(tensor, *arguments, **named):
    device, dtype, _, _ = torch._C._nn._parse_to(
        *arguments, **{k: v for k, v in named.items() if k != "copy"}
    )
    if device is None or device.type == tensor.device.type:
        return _to(tensor, *arguments, **named)
    moved = torch.empty(
        tensor.shape, dtype=dtype or tensor.dtype, device=GPU if device.type == "cuda" else device
    )
    return moved.requires_grad_(tensor.requires_grad)


def _move_module(module, *arguments, **named):
    """Replace the tensors of a module: fake ones cannot be swapped in place."""
    for child in module.modules():
        for name, value in child._parameters.items():
            if value is not None:
                moved = value.detach().to(*arguments, **named)
                child._parameters[name] = torch.nn.Parameter(moved, value.requires_grad)
        for name, value in child._buffers.items():
            if value is not None:
                child._buffers[name] = value.to(*arguments, **named)
    return module


def _index(tensor, index):
    """Index as Python does, whose own function would ask for CUDA."""
    items = index if isinstance(index, tuple) else (index,)
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    dim, indices = 0, {}
    for item in items:
        if item is Ellipsis:
            dim += tensor.ndim - dim - (consumed - dim)
        elif item is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(item, int):
            tensor = torch.select(tensor, dim, item)
        elif isinstance(item, slice):
            tensor = aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
            dim += 1
        else:
            indices[dim], dim = item, dim + 1
    if not indices:
        return tensor
    return aten.index.Tensor(tensor, [indices.get(d) for d in range(max(indices) + 1)])


@contextmanager
def fake_gpu():
    """Tensors that are moved to a GPU, or made there, have no data inside."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),  # a node of autograd would ask for CUDA's stream
        patch.object(torch.Tensor, "to", _move),
        patch.object(torch.Tensor, "__getitem__", _index),
        patch.object(torch.nn.Module, "to", _move_module),
        patch.object(torch.Tensor, "cpu", lambda self: self.to("cpu")),
        patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor),  # reads values
    ):
        yield GPU
