"""The losses of masked spectrogram patch modelling, with their gradients from the forward pass.

Within one clip, over its M masked patches with targets t, contrastive predictions c and
reconstructions r (SSAST, equations 1 and 2):

    S_ij     = t_i . c_j
    InfoNCE  = -1/M sum_i log softmax_j(S)_ii      softmax_axis "official", the published code
             = -1/M sum_j log softmax_i(S)_jj      softmax_axis "paper", equation 1
    accuracy = 1/M #{j : argmax_i softmax(S)_ij = j}
    MSE      = 1/(M P) sum_i |r_i - t_i|^2

Both losses are linear in what comes from above, so the forward pass already has the gradients:
d InfoNCE / d c_j = 1/M sum_i (softmax(S)_ij - delta_ij) t_i. S and the softmax are not kept.

Where clips have different numbers of masked patches, M is the largest of them and ``num_masked``
says how many rows of a clip count. The others may hold anything, and their gradient is 0.

On a GPU, S exists in tiles alone, which are computed twice (three times over "official", whose
normaliser is that of a row while the accuracy and the gradient go down the columns). Products are
taken in the dtype of the inputs, float32 as three TF32 products, and summed in float32; float64
goes the way of the CPU.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture

SoftmaxAxis = Literal["official", "paper"]


def info_nce_reference(
    targets: Tensor,
    predictions: Tensor,
    softmax_axis: SoftmaxAxis,
    num_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of InfoNCE and its accuracy, both [B]; differentiable."""
    if num_masked is not None:
        clips = [
            info_nce_reference(targets[b : b + 1, :n], predictions[b : b + 1, :n], softmax_axis)
            for b, n in enumerate(num_masked.tolist())
        ]
        return torch.cat([nce for nce, _ in clips]), torch.cat([hit for _, hit in clips])
    if targets.shape[1] == 0:
        nothing = predictions.sum((1, 2))
        return nothing, nothing.detach().clone()
    scores = torch.einsum("bip,bjp->bij", targets, predictions)
    log_p = scores.log_softmax(2 if softmax_axis == "official" else 1)
    # The published code takes the argmax down the columns, whichever way the softmax went.
    best = (log_p if softmax_axis == "official" else scores).argmax(1)
    hit = best == torch.arange(scores.shape[1], device=scores.device)
    nce = -log_p.diagonal(dim1=1, dim2=2).mean(1)
    return nce, hit.to(scores.dtype).mean(1)


def mse_reference(targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None) -> Tensor:
    """The definition of the reconstruction loss, [B]; differentiable."""
    if num_masked is not None:
        clips = [
            mse_reference(targets[b : b + 1, :n], predictions[b : b + 1, :n])
            for b, n in enumerate(num_masked.tolist())
        ]
        return torch.cat(clips)
    if targets.shape[1] == 0:
        return predictions.sum((1, 2))
    return (predictions - targets).square().mean((1, 2))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows_that_count(num_masked: Tensor | None, M: int) -> Tensor | None:
    """[B, M] bool; None: all of them."""
    if num_masked is None:
        return None
    return torch.arange(M, device=num_masked.device) < num_masked[:, None]


def _divisor(num_masked: Tensor | None, M: int, dtype: torch.dtype) -> Tensor | int:
    """Of the means over the rows of a clip, at least 1, [B]."""
    return max(M, 1) if num_masked is None else num_masked.clamp(1, max(M, 1)).to(dtype)


def _keep(rows: Tensor | None, x: Tensor) -> Tensor:
    """0 wherever a row does not count; ``x`` is [B, M] or [B, M, P]."""
    return x if rows is None else x.where(rows.view(*rows.shape, *[1] * (x.ndim - 2)), 0)


def _info_nce_torch(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, _ = targets.shape
    rows = _rows_that_count(num_masked, M)
    t, c = (_keep(rows, _at_least_fp32(x)) for x in (targets, predictions))
    if M == 0:
        return t.new_zeros(B), t.new_zeros(B), torch.zeros_like(predictions)
    count = _divisor(num_masked, M, t.dtype)
    log_p = t @ c.transpose(1, 2)  # [B, i, j]; one buffer becomes scores, log p, p and p - delta
    if rows is not None:
        log_p.masked_fill_(~(rows[:, :, None] & rows[:, None, :]), -torch.inf)
    normaliser = log_p.logsumexp(1 if over_targets else 2)
    log_p -= _keep(rows, normaliser).unsqueeze(1 if over_targets else 2)
    nce = -_keep(rows, log_p.diagonal(dim1=1, dim2=2)).sum(1) / count
    # Over the targets, the normaliser of column j is the same for all i: the argmax is that of S.
    hit = _keep(rows, log_p.argmax(1) == torch.arange(M, device=t.device))
    p = log_p.exp_()
    p.diagonal(dim1=1, dim2=2).sub_(1 if rows is None else rows.to(p.dtype))
    gradient = torch.bmm(p.transpose(1, 2), t)
    gradient /= count if isinstance(count, int) else count[:, None, None]
    return nce, hit.sum(1).to(t.dtype) / count, gradient.to(predictions.dtype)


_info_nce = torch.library.custom_op("ssast::info_nce", _info_nce_torch, mutates_args=())


def _mse_torch(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _, M, P = targets.shape
    error = _at_least_fp32(predictions) - _at_least_fp32(targets)
    error = _keep(_rows_that_count(num_masked, M), error)
    size = _divisor(num_masked, M, error.dtype) * max(P, 1)
    mse = error.flatten(1).square().sum(1) / size
    error *= 2 / (size if isinstance(size, int) else size[:, None, None])
    return mse, error.to(predictions.dtype).contiguous()


_mse = torch.library.custom_op("ssast::mse", _mse_torch, mutates_args=())


@triton.jit
def _count(num_masked, b, M):
    if num_masked is None:
        return M
    else:
        return tl.minimum(tl.load(num_masked + b), M).to(tl.int32)


@triton.jit
def _load_tile(x, rows, count, first, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Columns ``first`` and on of these rows of a clip; 0 beyond the rows that count and P."""
    k = first + tl.arange(0, BLOCK_P)
    inside = (rows < count)[:, None]
    if P % BLOCK_P != 0:
        inside &= (k < P)[None, :]
    return tl.load(x + rows[:, None] * P + k[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(x, y, x_rows, y_rows, count, P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products of these rows of a clip, x y^T, in chunks of P."""
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
    """max_j S_ij and log sum_j exp(S_ij - max); one program per tile of targets of a clip.

    Two numbers, because their sum would be rounded to the precision of S.
    """
    tiles = tl.cdiv(M, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    count = _count(num_masked, b, M)
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
    """Sums of the loss and the hits, and the gradient; over the targets where there is no row_max.

    One program per tile of predictions of a clip and chunk of P.
    """
    OVER_TARGETS: tl.constexpr = row_max is None
    WHOLE: tl.constexpr = P <= BLOCK_K and BLOCK_K == BLOCK_P
    tiles = tl.cdiv(M, BLOCK_OWN)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    chunk = tl.program_id(1) * BLOCK_P
    count = _count(num_masked, b, M)
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
        largest, place = tl.max(scores, 1, return_indices=True)
        best_i = tl.where(largest > best, first + place, best_i)
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
    counts = j < count
    scale = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if OVER_TARGETS:
        # p_jj - 1 = -sum_i!=j p_ij: nothing cancels where the own target has nearly all.
        total = others + tl.exp(own - best)
        weighted -= others[:, None] * _load_tile(targets, j, count, chunk, P, BLOCK_P).to(
            tl.float32
        )
        weighted = weighted / total[:, None]
        own -= best + tl.log(total)
    weighted = tl.where(counts[:, None], weighted * scale, 0.0)
    k = chunk + tl.arange(0, BLOCK_P)
    tl.store(
        gradient + b * M * P + j[:, None] * P + k[None, :],
        weighted.to(gradient.dtype.element_ty),
        mask=(j < M)[:, None] & (k < P)[None, :],
    )
    if chunk == 0:
        place = tl.program_id(0)
        tl.store(losses + place, -tl.sum(tl.where(counts, own, 0.0), 0))
        tl.store(hits + place, tl.sum((counts & (best_i == j)).to(tl.float32), 0))


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
    """Sums of squares and the gradient; one program per block of a clip's M * P numbers."""
    tiles = tl.cdiv(M * P, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    size = _count(num_masked, b, M) * P
    place = b * M * P + n
    t = tl.load(targets + place, mask=n < size, other=0.0).to(tl.float32)
    r = tl.load(predictions + place, mask=n < size, other=0.0).to(tl.float32)
    error = r - t
    tl.store(sums + tl.program_id(0), tl.sum(error * error, 0))
    scale = 2.0 / tl.maximum(size, 1).to(tl.float32)
    tl.store(gradient + place, (error * scale).to(gradient.dtype.element_ty), mask=n < M * P)


def _blocks(arch: int, dtype: torch.dtype, P: int) -> tuple[int, int, int, int]:
    """BLOCK_K, BLOCK_P, BLOCK_LOOP and warps with which nothing spills on sm_80, sm_90, sm_100.

    In half precision a whole patch of up to 256 numbers stays on the chip. In float32, with three
    products for one, it does not fit: the scores are computed in chunks of P, anew for each chunk
    of the gradient.
    """
    width = max(16, triton.next_power_of_2(P))
    if dtype == torch.float32:
        return min(32, width), min(128, width), 32, 8
    # Tensor cores that read registers and not shared memory leave fewer of them.
    loop = 64 if 90 <= arch < 120 else 32
    return width if width <= 256 else 64, min(256, width), loop, 4 if width <= 64 else 8


@_info_nce.register_kernel("cuda")
def _info_nce_cuda(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, predictions.dtype)
    if dtype == torch.float64 or predictions.numel() == 0:
        return _info_nce_torch(targets, predictions, over_targets, num_masked)
    B, M, P = targets.shape
    t, c = (x.to(dtype).contiguous() for x in (targets, predictions))
    n = None if num_masked is None else num_masked.contiguous()
    block_k, block_p, loop, num_warps = _blocks(architecture(t.device), dtype, P)
    blocks = {"BLOCK_K": block_k, "BLOCK_OWN": 64, "num_warps": num_warps, "num_stages": 2}
    gradient = predictions.new_empty(predictions.shape)
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
    count = _divisor(num_masked, M, torch.float32)
    return losses.sum(1) / count, hits.sum(1) / count, gradient


@_info_nce.register_fake
def _(
    targets: Tensor, predictions: Tensor, over_targets: bool, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, torch.float32)
    per_clip = targets.new_empty(len(targets), dtype=dtype)
    return per_clip, torch.empty_like(per_clip), predictions.new_empty(predictions.shape)


@_mse.register_kernel("cuda")
def _mse_cuda(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (targets.dtype, predictions.dtype) or predictions.numel() == 0:
        return _mse_torch(targets, predictions, num_masked)
    B, M, P = targets.shape
    block = 4096
    tiles = triton.cdiv(M * P, block)
    sums = torch.empty(B, tiles, dtype=torch.float32, device=targets.device)
    gradient = predictions.new_empty(predictions.shape)
    _mse_kernel[(B * tiles,)](
        targets.contiguous(), predictions.contiguous(),
        None if num_masked is None else num_masked.contiguous(),
        sums, gradient, M, P=P, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return sums.sum(1) / (_divisor(num_masked, M, torch.float32) * P), gradient


@_mse.register_fake
def _(
    targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(targets.dtype, torch.float32)
    return targets.new_empty(len(targets), dtype=dtype), predictions.new_empty(predictions.shape)


def _save_gradient(ctx, inputs, output) -> None:
    *values, gradient = output
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(*values[1:], gradient)


def _scale_gradient(ctx, upstream: Tensor) -> Tensor:
    (gradient,) = ctx.saved_tensors
    return gradient * upstream.to(gradient.dtype)[:, None, None]


_info_nce.register_autograd(
    lambda ctx, dnce, _a, _g: (None, _scale_gradient(ctx, dnce), None, None),
    setup_context=_save_gradient,
)
_mse.register_autograd(
    lambda ctx, dmse, _g: (None, _scale_gradient(ctx, dmse), None), setup_context=_save_gradient
)


def info_nce(
    targets: Tensor,
    predictions: Tensor,
    softmax_axis: SoftmaxAxis = "official",
    num_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE over the masked patches of each clip, and how often a patch is told from the others.

    Args:
        targets: [B, M, P], the normalised masked patches; no gradient flows to them.
        predictions: [B, M, P].
        softmax_axis: See the module.
        num_masked: [B] int64, from 0 to M: only the first ``num_masked[b]`` rows of clip b count,
            the others may hold anything. None: all count.

    Returns:
        The loss (nats) and the accuracy of each clip, [B], float32 (float64 for float64 input); 0
        where no row counts.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(targets, predictions, num_masked, "info_nce")
    nce, accuracy, _ = _info_nce(targets, predictions, softmax_axis == "paper", num_masked)
    return nce, accuracy


def mse(targets: Tensor, predictions: Tensor, num_masked: Tensor | None = None) -> Tensor:
    """Mean squared error over the masked patches of each clip.

    Args:
        targets: [B, M, P], the normalised masked patches; no gradient flows to them.
        predictions: [B, M, P].
        num_masked: As for :func:`info_nce`.

    Returns:
        [B], float32 (float64 for float64 input); 0 where no row counts.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(targets, predictions, num_masked, "mse")
    return _mse(targets, predictions, num_masked)[0]


def _check(targets: Tensor, predictions: Tensor, num_masked: Tensor | None, name: str) -> None:
    if targets.shape != predictions.shape or targets.ndim != 3:
        raise ValueError(
            f"{name}: targets and predictions must both be [B, M, P], "
            f"got {list(targets.shape)} and {list(predictions.shape)}"
        )
    if num_masked is not None and num_masked.shape != targets.shape[:1]:
        raise ValueError(
            f"{name}: num_masked must be [B], [{len(targets)}], got {list(num_masked.shape)}"
        )
