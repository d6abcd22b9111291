"""Linear layers whose bias gradient comes from a pass that is made anyway.

    linear_gelu:   h = x W^T + b;  y = gelu(h)                dh = dy * gelu'(h);  db = sum dh
    linear_chunks: (y_1, ..., y_n) = chunks of x W^T + b      dh = [dy_1, ..., dy_n];  db = sum dh
    both:          dx = dh W;  dW = dh^T x

gelu(h) = h Phi(h) with the normal distribution's Phi, not its approximation by tanh (Hendrycks and
Gimpel 2016). PyTorch's operations read dh once more for the sum over all rows, db; here the sum is
taken where dh is computed or copied together. Gradients of chunks that lie side by side already are
not copied: attention can write them so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssast.kernels.autocast import autocast_off, autocast_rule
from ssast.kernels.operation import custom_op, is_transformed, on_first_call


def sum_rows(x: Tensor) -> Tensor:
    """Sum [..., D] over all dimensions but the last, as the gradient of a bias is: [D]."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def _gelu_backward_torch(grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    dh = torch.ops.aten.gelu_backward(grad, h)
    return dh, sum_rows(dh)


def _gelu_backward_fake(grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[-1])


_gelu_backward = custom_op(
    "gelu_backward",
    _gelu_backward_torch,
    cuda=on_first_call("linear_kernels", "gelu_backward"),
    fake=_gelu_backward_fake,
    autocast="none",
)


def _join_chunks_torch(
    first: Tensor, second: Tensor, third: Tensor | None
) -> tuple[Tensor, Tensor]:
    joined = torch.cat([x for x in (first, second, third) if x is not None], -1)
    return joined, sum_rows(joined)


def _join_chunks_fake(first: Tensor, second: Tensor, third: Tensor | None) -> tuple[Tensor, Tensor]:
    D = first.shape[-1] * (2 if third is None else 3)
    return first.new_empty(*first.shape[:-1], D), first.new_empty(D)


_join_chunks = custom_op(
    "join_chunks",
    _join_chunks_torch,
    cuda=on_first_call("linear_kernels", "join_chunks"),
    fake=_join_chunks_fake,
    autocast="none",
)


def joined_view(chunks: Sequence[Tensor]) -> Tensor | None:
    """Return chunks [..., D] as one tensor [..., n D] where they lie side by side in memory."""
    first, D = chunks[0], chunks[0].shape[-1]
    if torch.compiler.is_compiling() or first.numel() == 0:
        return None
    for i, x in enumerate(chunks):
        if (
            (x.requires_grad and torch.is_grad_enabled())  # a view of memory has no derivative
            or x.shape != first.shape
            or x.stride() != first.stride()
            or x.untyped_storage()._cdata != first.untyped_storage()._cdata
            or x.storage_offset() != first.storage_offset() + i * D
        ):
            return None
    size = (*first.shape[:-1], len(chunks) * D)
    joined = first.as_strided(size, first.stride())
    return joined if joined.is_contiguous() else None


def _gradients(ctx: Any, dh: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    rows = dh.reshape(-1, dh.shape[-1])
    with autocast_off(dh.device.type):  # as in the forward pass
        dx = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        dweight = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return dx, dweight


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, h)
        ctx.set_materialize_grads(False)  # h has a gradient in second derivatives alone
        return functional.gelu(h), h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_too: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, h = ctx.saved_tensors
        dh, dbias = _gelu_backward(torch.zeros_like(h) if dy is None else dy, h)
        if dh_too is not None:
            dh, dbias = dh + dh_too, dbias + sum_rows(dh_too)
        return *_gradients(ctx, dh, x, weight), dbias


class _LinearChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, chunks: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias).chunk(chunks, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = joined_view(grads)
        if joined is not None:
            dbias = sum_rows(joined)
        else:
            joined, dbias = _join_chunks(*grads, *[None] * (3 - len(grads)))
        return *_gradients(ctx, joined, *ctx.saved_tensors), dbias, None


def _is_plain(*tensors: Tensor) -> bool:
    # A file for other programs has PyTorch's operations alone, and torch.func takes its own.
    return torch.compiler.is_exporting() or is_transformed(*tensors)


@autocast_rule("lower_precision")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the exact GELU of a linear layer.

    Autocast: its dtype, for inputs and result.

    Args:
        x: [..., D].
        weight: [D', D].
        bias: [D'].

    Returns:
        [..., D'].
    """
    if _is_plain(x, weight, bias):
        return functional.gelu(functional.linear(x, weight, bias))
    return _LinearGelu.apply(x, weight, bias)[0]


@autocast_rule("lower_precision")
def linear_chunks(x: Tensor, weight: Tensor, bias: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Compute several linear layers of the same width as one.

    Autocast: its dtype, for inputs and results.

    Args:
        x: [..., D].
        weight: [n D', D].
        bias: [n D'].
        chunks: n, 2 or 3.

    Returns:
        n tensors [..., D'].

    Raises:
        ValueError: The weight is not for 2 or 3 chunks.
    """
    if chunks not in (2, 3) or len(weight) % chunks:
        raise ValueError(f"linear_chunks: {len(weight)} rows of the weight for {chunks} chunks")
    if _is_plain(x, weight, bias):
        return functional.linear(x, weight, bias).chunk(chunks, -1)
    return _LinearChunks.apply(x, weight, bias, chunks)
