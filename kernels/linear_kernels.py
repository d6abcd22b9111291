"""Triton kernels that make the gradient of a linear layer's output; see ``linear``.

A program goes over its share of the rows, in some columns, and sums them as it goes.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import on_its_device
from ssast.kernels.partial_sums import add_parts, num_parts

_ROWS, _WIDTH = 8, 256  # of a block
_SQRT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)


@triton.jit(do_not_specialize=["num_rows", "share"])
def _gelu_backward_kernel(
    grad, h, dh, partial, num_rows, share,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SQRT_HALF: tl.constexpr, DENSITY: tl.constexpr,
):  # fmt: skip
    """Compute dh for a share of the rows in WIDTH columns, and the sums of these columns."""
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    column = d < D
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, share, ROWS):
        row = tl.program_id(0) * share + start + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & column[None, :]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 + 0.5 * tl.math.erf(value * SQRT_HALF)
        gradient *= below + value * tl.exp(-0.5 * value * value) * DENSITY
        sums += gradient
        tl.store(dh + place, gradient.to(dh.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * D + d, tl.sum(sums, 0), mask=column)


@triton.jit
def _join(
    source, joined, partial, column, num_rows, share, size,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy a share of the rows of one chunk; ``joined`` and ``partial`` begin at the chunk."""
    d = column * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, share, ROWS):
        row = (tl.program_id(0) * share + start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (d < D)[None, :]
        value = tl.load(source + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(joined + row[:, None] * size + d[None, :], value, mask=inside)
        sums += value.to(tl.float32)
    tl.store(partial + tl.program_id(0) * size + d, tl.sum(sums, 0), mask=d < D)


@triton.jit(do_not_specialize=["num_rows", "share"])
def _join_chunks_kernel(
    first, second, third, joined, partial, num_rows, share,
    D: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = CHUNKS * D
    columns: tl.constexpr = (D + WIDTH - 1) // WIDTH
    column, chunk = tl.program_id(1) % columns, tl.program_id(1) // columns
    joined += chunk * D
    partial += chunk * D
    if chunk == 0:
        _join(first, joined, partial, column, num_rows, share, size, D, ROWS, WIDTH)
    elif chunk == 1:
        _join(second, joined, partial, column, num_rows, share, size, D, ROWS, WIDTH)
    else:
        _join(third, joined, partial, column, num_rows, share, size, D, ROWS, WIDTH)


def _blocks(like: Tensor, num_rows: int, D: int, chunks: int = 1) -> tuple[int, int, int]:
    """Return the width of a block, the blocks beside each other and the rows of a program."""
    width = min(_WIDTH, max(32, triton.next_power_of_2(D)))
    columns, blocks = chunks * triton.cdiv(D, width), triton.cdiv(num_rows, _ROWS)
    programs = max(1, num_parts(like, blocks * columns) // columns)
    return width, columns, triton.cdiv(blocks, programs) * _ROWS


@on_its_device
def gelu_backward(grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of h [..., D] and its sum over the rows, [D]."""
    D = h.shape[-1]
    grad, h, num_rows = grad.contiguous(), h.contiguous(), h.numel() // D
    width, columns, share = _blocks(h, num_rows, D)
    dh, dbias = torch.empty_like(h), h.new_empty(D)
    partial = h.new_empty(1, triton.cdiv(num_rows, share), D, dtype=torch.float32)
    _gelu_backward_kernel[(partial.shape[1], columns)](
        grad, h, dh, partial, num_rows, share,
        D=D, ROWS=_ROWS, WIDTH=width, SQRT_HALF=_SQRT_HALF, DENSITY=_DENSITY, num_warps=4,
    )  # fmt: skip
    add_parts(partial, dbias)
    return dh, dbias


@on_its_device
def join_chunks(first: Tensor, second: Tensor, third: Tensor | None) -> tuple[Tensor, Tensor]:
    """Join two or three tensors [..., D] to [..., n D]; sum that over the rows, [n D]."""
    D, num_rows = first.shape[-1], first.numel() // first.shape[-1]
    chunks = [x.contiguous() for x in (first, second, third) if x is not None]
    n = len(chunks)
    width, columns, share = _blocks(first, num_rows, D, n)
    joined, sums = first.new_empty(*first.shape[:-1], n * D), first.new_empty(n * D)
    partial = first.new_empty(1, triton.cdiv(num_rows, share), n * D, dtype=torch.float32)
    _join_chunks_kernel[(partial.shape[1], columns)](
        *chunks, *chunks[: 3 - n], joined, partial, num_rows, share,
        D=D, CHUNKS=n, ROWS=_ROWS, WIDTH=width, num_warps=4,
    )  # fmt: skip
    add_parts(partial, sums)
    return joined, sums
