"""The Triton kernels of the residual addition with its LayerNorm; see ``add_norm``.

A program has whole rows in registers. The backward pass has a fixed number of programs, each of
which goes over its share of the rows and sums the columns as it goes; see ``partial_sums``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import on_its_device
from ssast.kernels.partial_sums import add_parts, num_parts

_FORWARD, _BACKWARD = 4096, 2048  # elements of a program at a time


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm_kernel(
    x, update, bias, weight, shift, total, out, means, rstds, num_rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    valid, column = row < num_rows, d < D
    inside = valid[:, None] & column[None, :]
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + d, mask=column, other=0.0).to(tl.float32)[None, :]
    value += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # What is stored is normalised: the backward pass reads that.
    stored = value.to(total.dtype.element_ty)
    tl.store(total + place, stored, mask=inside)
    value = stored.to(tl.float32)
    mean = tl.sum(value, 1) / D
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(weight + d, mask=column, other=0.0).to(tl.float32)
    b = tl.load(shift + d, mask=column, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    tl.store(means + row, mean, mask=valid)
    tl.store(rstds + row, rstd, mask=valid)


@triton.jit(do_not_specialize=["num_rows", "share"])
def _add_norm_backward_kernel(
    dout, dtotal, total, means, rstds, weight, dx, partial, num_rows, share,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute dx for a share of the rows, and the share's part of the three column sums."""
    d = tl.arange(0, WIDTH)
    column = d < D
    w = tl.load(weight + d, mask=column, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dshift = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, share, ROWS):
        row = tl.program_id(0) * share + start + tl.arange(0, ROWS)
        valid = row < num_rows
        inside = valid[:, None] & column[None, :]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        mean = tl.load(means + row, mask=valid, other=0.0)
        rstd = tl.load(rstds + row, mask=valid, other=0.0)
        gradient = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (normalised - mean[:, None]) * rstd[:, None], 0.0)
        dweight += gradient * normalised
        dshift += gradient
        gradient *= w[None, :]
        along = tl.sum(gradient * normalised, 1) / D
        gradient -= normalised * along[:, None] + (tl.sum(gradient, 1) / D)[:, None]
        gradient = tl.where(inside, gradient * rstd[:, None], 0.0)
        if dtotal is not None:
            gradient += tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        dbias += gradient
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=inside)
    part = partial + tl.program_id(0) * D + d
    size = tl.num_programs(0) * D
    tl.store(part, tl.sum(dbias, 0), mask=column)
    tl.store(part + size, tl.sum(dweight, 0), mask=column)
    tl.store(part + 2 * size, tl.sum(dshift, 0), mask=column)


def _blocks(D: int, elements: int) -> tuple[int, int, int]:
    """Return rows and width of a block, and warps."""
    width = max(32, triton.next_power_of_2(D))
    rows = max(1, elements // width)
    return rows, width, 4 if rows * width <= 4096 else 8


@on_its_device
def forward(
    x: Tensor, update: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute sum and normalised sum [..., D], mean and 1 / deviation [...] in float32."""
    x, update, D = x.contiguous(), update.contiguous(), x.shape[-1]
    rows, width, num_warps = _blocks(D, _FORWARD)
    total, out = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    _add_norm_kernel[(triton.cdiv(mean.numel(), rows),)](
        x, update, bias.contiguous(), weight.contiguous(), norm_bias.contiguous(), total, out,
        mean, rstd, mean.numel(), eps, D=D, ROWS=rows, WIDTH=width, num_warps=num_warps,
    )  # fmt: skip
    return total, out, mean, rstd


@on_its_device
def backward(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x (and the update), of both biases and of the weight."""
    D, num_rows = total.shape[-1], mean.numel()
    rows, width, num_warps = _blocks(D, _BACKWARD)
    dx = torch.empty_like(total)
    dbias, dweight, dshift = (torch.empty_like(weight) for _ in range(3))
    blocks = triton.cdiv(num_rows, rows)
    share = triton.cdiv(blocks, num_parts(total, blocks)) * rows
    partial = total.new_empty(3, triton.cdiv(num_rows, share), D, dtype=torch.float32)
    _add_norm_backward_kernel[(partial.shape[1],)](
        dout.contiguous(), None if dtotal is None else dtotal.contiguous(), total, mean, rstd,
        weight.contiguous(), dx, partial, num_rows, share,
        D=D, ROWS=rows, WIDTH=width, num_warps=num_warps,
    )  # fmt: skip
    add_parts(partial, dbias, dweight, dshift)
    return dx, dbias, dweight, dshift
