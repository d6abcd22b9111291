"""Column sums in two launches that repeat themselves: partial sums, added in a fixed order.

A kernel that passes over rows anyway sums its columns on the way: program p of P writes the sums of
its rows, [K, P, D] float32 for K quantities. A second launch adds the P parts one after the other,
so that the result depends on no order of programs.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture, on_its_device

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
_PARTS, _WIDTH = 128, 32


def num_parts(partial_of: Tensor, blocks: int) -> int:
    """Return how many programs share ``blocks`` blocks of rows: four on a multiprocessor."""
    return max(1, min(blocks, 4 * MULTIPROCESSORS.get(architecture(partial_of.device), 84)))


@triton.jit
def sum_parts(pid, partial, out, parts, size, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Sum [parts, size] over the first axis; program ``pid`` does WIDTH columns."""
    i = pid * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS)).to(tl.int64)
        mask = (part < parts)[:, None] & (i < size)[None, :]
        x = tl.load(partial + part[:, None] * size + i[None, :], mask=mask, other=0.0)
        total += tl.sum(x, 0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["parts"])
def _add_parts_kernel(
    partial, first, second, third, parts, D: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    pid, which = tl.program_id(0), tl.program_id(1)
    if which == 0:
        sum_parts(pid, partial, first, parts, D, PARTS, WIDTH)
    elif which == 1:
        sum_parts(pid, partial + parts * D, second, parts, D, PARTS, WIDTH)
    else:
        sum_parts(pid, partial + 2 * parts * D, third, parts, D, PARTS, WIDTH)


@on_its_device
def add_parts(partial: Tensor, *out: Tensor) -> None:
    """Add the parts of [K, P, D] float32 into K tensors [D] of any dtype; K is 1 to 3."""
    K, parts, D = partial.shape
    first, second, third = (*out, *out[:1] * (3 - K))
    _add_parts_kernel[(triton.cdiv(D, _WIDTH), K)](
        partial, first, second, third, parts, D=D, PARTS=_PARTS, WIDTH=_WIDTH, num_warps=4
    )
