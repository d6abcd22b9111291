"""The losses on CUDA; see mspm_loss.py.

S exists in tiles alone, which are computed once for each chunk of P, and once more for
"official", whose normaliser is that of a row while the accuracy and the gradient go down the
columns. Matmuls take the dtype of the inputs, float32 as three TF32 matmuls, and accumulate in
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture, on_its_device
from ssast.kernels.mspm_loss import mse_gradient_dtype


@triton.jit
def _valid_count(num_masked, b, M):
    if num_masked is None:
        return M
    else:
        return tl.minimum(tl.load(num_masked + b), M).to(tl.int32)


@triton.jit
def _load_tile(x, rows, count, first, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load columns from ``first`` on of these rows of a clip; 0 beyond the valid rows and P."""
    k = first + tl.arange(0, BLOCK_P)
    inside = (rows < count)[:, None]
    if P % BLOCK_P != 0:
        inside &= (k < P)[None, :]
    return tl.load(x + rows[:, None] * P + k[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(x, y, x_rows, y_rows, count, P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute x y^T of these rows of a clip, in chunks of P."""
    scores = tl.zeros((x_rows.shape[0], y_rows.shape[0]), tl.float32)
    for k in range(0, P, BLOCK_K):
        a = _load_tile(x, x_rows, count, k, P, BLOCK_K)
        b = _load_tile(y, y_rows, count, k, P, BLOCK_K)
        scores = tl.dot(a, tl.trans(b), scores, input_precision="tf32x3")
    return scores


@triton.jit(do_not_specialize=["M"])
def _row_normalisers_kernel(
    targets,
    predictions,
    num_masked,
    row_max,
    row_log,
    M,
    P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_LOOP: tl.constexpr,
):
    """Compute max_j S_ij and log sum_j exp(S_ij - max): a program per tile of a clip's targets.

    Two numbers, because their sum would be rounded to the precision of S.
    """
    tiles = tl.cdiv(M, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    count = _valid_count(num_masked, b, M)
    targets += b * M * P
    predictions += b * M * P
    if P <= BLOCK_K:
        t = _load_tile(targets, i, count, 0, P, BLOCK_K)
    largest = tl.full((BLOCK_OWN,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    end = tl.where(tile * BLOCK_OWN < count, count, 0)
    for first in range(0, end, BLOCK_LOOP):
        j = first + tl.arange(0, BLOCK_LOOP)
        if P <= BLOCK_K:
            c = _load_tile(predictions, j, count, 0, P, BLOCK_K)
            scores = tl.dot(t, tl.trans(c), input_precision="tf32x3")
        else:
            scores = _scores(targets, predictions, i, j, count, P, BLOCK_K)
        scores = tl.where((j < count)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger[:, None]), 1)
        largest = larger
    tl.store(row_max + b * M + i, largest, mask=i < M)
    tl.store(row_log + b * M + i, tl.log(total), mask=i < M)


@triton.jit(do_not_specialize=["M"])
def _info_nce_kernel(
    targets,
    predictions,
    num_masked,
    row_max,
    row_log,
    losses,
    hits,
    gradient,
    M,
    P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_LOOP: tl.constexpr,
):
    """Sum the loss and the hits of a tile of a clip's predictions, and compute its gradient.

    The softmax goes over the targets where row_max is None. One program per tile and chunk of P.
    """
    OVER_TARGETS: tl.constexpr = row_max is None
    WHOLE: tl.constexpr = P <= BLOCK_K and BLOCK_K == BLOCK_P
    tiles = tl.cdiv(M, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    chunk = tl.program_id(1) * BLOCK_P
    count = _valid_count(num_masked, b, M)
    targets += b * M * P
    predictions += b * M * P
    if WHOLE:
        c = _load_tile(predictions, j, count, 0, P, BLOCK_P)
    best = tl.full((BLOCK_OWN,), float("-inf"), tl.float32)
    best_i = tl.zeros((BLOCK_OWN,), tl.int32)
    own = tl.zeros((BLOCK_OWN,), tl.float32)
    others = tl.zeros((BLOCK_OWN,), tl.float32)
    weighted = tl.zeros((BLOCK_OWN, BLOCK_P), tl.float32)
    end = tl.where(tile * BLOCK_OWN < count, count, 0)
    for first in range(0, end, BLOCK_LOOP):
        i = first + tl.arange(0, BLOCK_LOOP)
        if WHOLE:
            t = _load_tile(targets, i, count, 0, P, BLOCK_P)
            scores = tl.dot(c, tl.trans(t), input_precision="tf32x3")  # [j, i]
        else:
            scores = _scores(predictions, targets, j, i, count, P, BLOCK_K)
            t = _load_tile(targets, i, count, chunk, P, BLOCK_P)
        if not OVER_TARGETS:
            scores -= tl.load(row_max + b * M + i, mask=i < count, other=0.0)[None, :]
            scores -= tl.load(row_log + b * M + i, mask=i < count, other=0.0)[None, :]
        scores = tl.where((i < count)[None, :], scores, float("-inf"))
        largest, offset = tl.max(scores, 1, return_indices=True)
        best_i = tl.where(largest > best, first + offset, best_i)
        diagonal = j[:, None] == i[None, :]
        own += tl.sum(tl.where(diagonal, scores, 0.0), 1)
        if OVER_TARGETS:
            larger = tl.maximum(best, largest)
            p = tl.where(diagonal, 0.0, tl.exp(scores - larger[:, None]))
            shrink = tl.exp(best - larger)
            others = others * shrink + tl.sum(p, 1)
            weighted *= shrink[:, None]
        else:
            p = tl.exp(scores) - tl.where(diagonal, 1.0, 0.0)
        best = tl.maximum(best, largest)
        weighted = tl.dot(p.to(t.dtype), t, weighted, input_precision="tf32x3")
    valid = j < count
    scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if OVER_TARGETS:
        # p_jj - 1 = -sum_i!=j p_ij: nothing cancels where the own target has nearly all.
        total = others + tl.exp(own - best)
        weighted -= others[:, None] * _load_tile(targets, j, count, chunk, P, BLOCK_P).to(
            tl.float32
        )
        weighted = weighted / total[:, None]
        own -= best + tl.log(total)
    weighted = tl.where(valid[:, None], weighted * scale, 0.0)
    k = chunk + tl.arange(0, BLOCK_P)
    tl.store(
        gradient + b * M * P + j[:, None] * P + k[None, :],
        weighted.to(gradient.dtype.element_ty),
        mask=(j < M)[:, None] & (k < P)[None, :],
    )
    if chunk == 0:
        offset = tl.program_id(0)
        tl.store(losses + offset, -tl.sum(tl.where(valid, own, 0.0), 0))
        tl.store(hits + offset, tl.sum((valid & (best_i == j)).to(tl.float32), 0))


@triton.jit(do_not_specialize=["M"])
def _mse_kernel(
    targets,
    predictions,
    num_masked,
    sums,
    gradient,
    M,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squares and compute the gradient: a program per block of a clip's M * P numbers."""
    tiles = tl.cdiv(M * P, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    size = _valid_count(num_masked, b, M) * P
    offset = b * M * P + n
    t = tl.load(targets + offset, mask=n < size, other=0.0).to(tl.float32)
    r = tl.load(predictions + offset, mask=n < size, other=0.0).to(tl.float32)
    error = r - t
    tl.store(sums + tl.program_id(0), tl.sum(error * error, 0))
    scale = 2.0 / tl.maximum(size, 1).to(tl.float32)
    tl.store(gradient + offset, (error * scale).to(gradient.dtype.element_ty), mask=n < M * P)


def _blocks(arch: int, dtype: torch.dtype, P: int) -> tuple[int, int, int, int]:
    """Return BLOCK_K, BLOCK_P, BLOCK_LOOP and warps that do not spill on sm_80, sm_90, sm_100.

    In half precision a whole patch of up to 256 numbers stays on the chip. In float32, with three
    matmuls for one, it does not fit: the scores are computed in chunks of P, anew for each chunk
    of the gradient.
    """
    width = max(16, triton.next_power_of_2(P))
    if dtype == torch.float32:
        return min(32, width), min(128, width), 32, 8
    # Tensor cores that read registers and not shared memory leave fewer of them.
    loop = 64 if 90 <= arch < 120 else 32
    return width if width <= 256 else 64, min(256, width), loop, 4 if width <= 64 else 8


def _num_valid(num_masked: Tensor | None, M: int) -> Tensor | int:
    """Return the number of valid rows of each clip, at least 1."""
    return M if num_masked is None else num_masked.clamp(1, M)


@on_its_device
def info_nce_on_cuda(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss and accuracy of each clip, [B] float32, and the predictions' gradient.

    Args:
        targets: [B, M, P], not empty.
        predictions: [B, M, P].
        over_targets: Whether the softmax goes over the targets.
        num_masked: [B] int64, valid rows of each clip; all if None.
    """
    B, M, P = targets.shape
    dtype = torch.promote_types(targets.dtype, predictions.dtype)
    t, c = targets.to(dtype).contiguous(), predictions.to(dtype).contiguous()
    n = None if num_masked is None else num_masked.contiguous()
    block_k, block_p, loop, num_warps = _blocks(architecture(t.device), t.dtype, P)
    blocks = {"BLOCK_K": block_k, "BLOCK_OWN": 64, "num_warps": num_warps, "num_stages": 2}
    gradient = torch.empty_like(c)
    tiles = triton.cdiv(M, blocks["BLOCK_OWN"])
    row_max, row_log = None, None
    if not over_targets:
        row_max, row_log = torch.empty(2, B, M, dtype=torch.float32, device=t.device)
        _row_normalisers_kernel[(B * tiles,)](
            t, c, n, row_max, row_log, M, P=P, BLOCK_LOOP=64, **blocks
        )
    losses, hits = torch.empty(2, B, tiles, dtype=torch.float32, device=t.device)
    _info_nce_kernel[(B * tiles, triton.cdiv(P, block_p))](
        t, c, n, row_max, row_log, losses, hits, gradient, M,
        P=P, BLOCK_P=block_p, BLOCK_LOOP=loop, **blocks,
    )  # fmt: skip
    count = _num_valid(num_masked, M)
    return losses.sum(1) / count, hits.sum(1) / count, gradient.to(predictions.dtype)


@on_its_device
def mse_on_cuda(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each clip, [B] float32, and its gradient; no tensor is empty."""
    B, M, P = targets.shape
    block = 4096
    tiles = triton.cdiv(M * P, block)
    sums = torch.empty(B, tiles, dtype=torch.float32, device=targets.device)
    gradient = predictions.new_empty(predictions.shape, dtype=mse_gradient_dtype(predictions))
    _mse_kernel[(B * tiles,)](
        targets.contiguous(), predictions.contiguous(),
        None if num_masked is None else num_masked.contiguous(),
        sums, gradient, M, P=P, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return sums.sum(1) / (_num_valid(num_masked, M) * P), gradient
