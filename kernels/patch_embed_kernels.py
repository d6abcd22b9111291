"""The Triton kernels of the patch embedding and their launchers; see ``patch_embed``.

Forward, one launch: programs that multiply tiles of the list of visible patches [B * V] by the
weight, and then programs that write what needs no matmul: the prefix tokens, the masked tokens and
the targets. The spectrogram is read as [patch, frame, mel], with mel bins contiguous as they are in
memory, and transposed in registers to the order of the weight, mel bins first.

Backward, three launches, every sum in a fixed order: partial weight gradients, each over a part of
the visible patches (and, beside that, a flag for each patch, masked or not); one pass over the
gradient of the tokens; the sums of the partial results.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import architecture, on_its_device
from ssast.kernels.partial_sums import MULTIPROCESSORS, sum_parts


class Blocks(NamedTuple):
    """Block sizes of a kernel with tensor cores."""

    rows: int  # patches
    width: int  # of D
    tile: int  # elements of a patch
    num_warps: int
    num_stages: int


# By bytes of an element, chosen from ahead-of-time reports: no spills, tensor cores used, two or
# more CTAs per SM (16 x 16 and 128 x 2 patches), and within the 99 KiB of shared memory that other
# architectures have.
_PROJECT = {2: Blocks(64, 128, 64, 8, 2), 4: Blocks(64, 64, 32, 4, 3)}
_PROJECT_SM80 = {2: Blocks(64, 64, 64, 8, 2), 4: Blocks(32, 64, 64, 4, 2)}
# One stage for float32: a pipeline would copy the transposed gradient word by word.
_WEIGHT_GRAD = {2: Blocks(64, 128, 64, 8, 3), 4: Blocks(32, 64, 64, 4, 1)}
_FILL_ROWS, _FILL_TILE = 8, 256


@triton.jit
def _natural(step, PATCH: tl.constexpr, TILE: tl.constexpr):
    """Return where the elements of tile ``step`` lie in a flattened patch, and which exist."""
    K: tl.constexpr = TILE[0] * TILE[1]
    k = tl.arange(0, K)
    if TILE[1] == PATCH[1]:
        offset = step * K + k
        exists = offset < PATCH[0] * PATCH[1]
    else:
        runs: tl.constexpr = (PATCH[1] + TILE[1] - 1) // TILE[1]
        mel = step // runs * TILE[0] + k // TILE[1]
        frame = step % runs * TILE[1] + k % TILE[1]
        offset = mel * PATCH[1] + frame
        exists = (mel < PATCH[0]) & (frame < PATCH[1])
    return offset, exists


@triton.jit
def _normalised(
    fbank, strides, mean, scale, clip, patch, valid, step,
    COLUMNS: tl.constexpr, PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load tile ``step`` of patches, normalised: [R, K] float32 in the order of the weight."""
    R: tl.constexpr = patch.shape[0]
    runs: tl.constexpr = (PATCH[1] + TILE[1] - 1) // TILE[1]
    mel = step // runs * TILE[0] + tl.arange(0, TILE[0])
    frame = step % runs * TILE[1] + tl.arange(0, TILE[1])
    first = clip.to(tl.int64) * strides[0]
    first += (patch % COLUMNS * STRIDE[1]).to(tl.int64) * strides[1]
    first += (patch // COLUMNS * STRIDE[0]).to(tl.int64) * strides[2]
    offsets = frame[:, None] * strides[1] + mel[None, :] * strides[2]
    exists = (frame < PATCH[1])[:, None] & (mel < PATCH[0])[None, :]
    x = tl.load(
        (fbank + first)[:, None, None] + offsets[None],
        mask=valid[:, None, None] & exists[None],
        other=0.0,
    )
    x = (x.to(tl.float32) - mean) * scale
    return tl.reshape(tl.permute(x, (0, 2, 1)), (R, TILE[0] * TILE[1]))


@triton.jit
def _project(
    pid, fbank, strides, mean, scale, weight, bias, pos_embed, visible_ids, tokens, num_visible, V,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Project visible patches; programs with the same patches are neighbours."""
    P: tl.constexpr = PATCH[0] * PATCH[1]
    columns: tl.constexpr = (D + WIDTH - 1) // WIDTH
    r = pid // columns * ROWS + tl.arange(0, ROWS)
    d = pid % columns * WIDTH + tl.arange(0, WIDTH)
    valid = r < num_visible
    inside = d < D
    clip = r // V
    patch = tl.load(visible_ids + r, mask=valid, other=0).to(tl.int32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(STEPS):
        x = _normalised(
            fbank, strides, mean, scale, clip, patch, valid, step, COLUMNS, PATCH, STRIDE, TILE
        )
        offset, exists = _natural(step, PATCH, TILE)
        w = tl.load(
            weight + d[None, :] * P + offset[:, None],
            mask=inside[None, :] & exists[:, None],
            other=0.0,
        )
        total = tl.dot(x.to(w.dtype), w, total, input_precision="tf32x3")
    mask = valid[:, None] & inside[None, :]
    pos = tl.load(pos_embed + (PREFIX + patch)[:, None] * D + d[None, :], mask=mask, other=0.0)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    total += pos.to(tl.float32) + b[None, :]
    row = clip.to(tl.int64) * (PREFIX + N) + PREFIX + patch
    out = tokens + row[:, None] * D + d[None, :]
    tl.store(out, total.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def _fill(
    pid, fbank, strides, mean, scale, mask_embed, pos_embed, prefix, mask_ids, tokens, targets, M,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write some of the prefix tokens and the masked patches of a clip."""
    P: tl.constexpr = PATCH[0] * PATCH[1]
    programs = tl.cdiv(PREFIX + M, ROWS)
    clip = (pid // programs).to(tl.int64)
    s = pid % programs * ROWS + tl.arange(0, ROWS)
    valid = s < PREFIX + M
    is_prefix = s < PREFIX
    is_masked = valid & (s >= PREFIX)
    patch = tl.load(mask_ids + clip * M + s - PREFIX, mask=is_masked, other=0).to(tl.int32)
    token = tl.where(is_prefix, s, PREFIX + patch)
    out = tokens + (clip * (PREFIX + N) + token)[:, None] * D
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        inside = (d < D)[None, :]
        leading = tl.load(
            prefix + s[:, None] * D + d[None, :], mask=is_prefix[:, None] & inside, other=0.0
        ).to(tl.float32)
        hidden = tl.load(mask_embed + d, mask=d < D, other=0.0).to(tl.float32)
        pos = tl.load(
            pos_embed + token[:, None] * D + d[None, :], mask=valid[:, None] & inside, other=0.0
        ).to(tl.float32)
        value = tl.where(is_prefix[:, None], leading, hidden[None, :]) + pos
        tl.store(out + d[None, :], value.to(tokens.dtype.element_ty), mask=valid[:, None] & inside)
    target = targets + (clip * M + s - PREFIX)[:, None] * P
    clips = tl.zeros((ROWS,), tl.int64) + clip
    for step in range(STEPS):
        x = _normalised(
            fbank, strides, mean, scale, clips, patch, is_masked, step,
            COLUMNS, PATCH, STRIDE, TILE,
        )  # fmt: skip
        offset, exists = _natural(step, PATCH, TILE)
        tl.store(
            target + offset[None, :],
            x.to(targets.dtype.element_ty),
            mask=is_masked[:, None] & exists[None, :],
        )


@triton.jit(do_not_specialize=["num_matmuls", "num_visible", "V", "M"])
def _patch_embed_kernel(
    fbank, strides, mean, scale, weight, bias, mask_embed, pos_embed, prefix, mask_ids,
    visible_ids, tokens, targets, num_matmuls, num_visible, V, M,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FILL_TILE: tl.constexpr, FILL_STEPS: tl.constexpr,
    FILL_ROWS: tl.constexpr, FILL_WIDTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_matmuls:
        _project(
            pid, fbank, strides, mean, scale, weight, bias, pos_embed, visible_ids, tokens,
            num_visible, V, D, N, PREFIX, COLUMNS, PATCH, STRIDE, TILE, STEPS, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _fill(
            pid - num_matmuls, fbank, strides, mean, scale, mask_embed, pos_embed, prefix,
            mask_ids, tokens, targets, M, D, N, PREFIX, COLUMNS, PATCH, STRIDE,
            FILL_TILE, FILL_STEPS, FILL_ROWS, FILL_WIDTH,
        )  # fmt: skip


@triton.jit
def _weight_grad(
    pid, fbank, strides, mean, scale, grad, visible_ids, partial, num_visible, V, share,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the part of the weight's gradient that comes from ``share`` visible patches."""
    P: tl.constexpr = PATCH[0] * PATCH[1]
    columns: tl.constexpr = (D + WIDTH - 1) // WIDTH
    step = pid % STEPS
    d = pid // STEPS % columns * WIDTH + tl.arange(0, WIDTH)
    split = pid // (STEPS * columns)
    inside = d < D
    total = tl.zeros((WIDTH, TILE[0] * TILE[1]), tl.float32)
    for start in range(0, share, ROWS):
        r = split * share + start + tl.arange(0, ROWS)
        valid = r < num_visible
        clip = r // V
        patch = tl.load(visible_ids + r, mask=valid, other=0).to(tl.int32)
        x = _normalised(
            fbank, strides, mean, scale, clip, patch, valid, step, COLUMNS, PATCH, STRIDE, TILE
        )
        row = clip.to(tl.int64) * (PREFIX + N) + PREFIX + patch
        g = tl.load(
            grad + row[:, None] * D + d[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(tl.trans(g), x.to(g.dtype), total, input_precision="tf32x3")
    offset, exists = _natural(step, PATCH, TILE)
    out = partial + split.to(tl.int64) * D * P + d[:, None] * P + offset[None, :]
    tl.store(out, total, mask=inside[:, None] & exists[None, :])


@triton.jit
def _flag(
    pid, mask_ids, visible_ids, is_masked, num_patches, M, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Flag the masked patches of the batch, [B, N]; every patch is in one of the two lists."""
    i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < num_patches
    clip, s = i // N, i % N
    hidden = s < M
    masked = tl.load(mask_ids + clip * M + s, mask=valid & hidden, other=0)
    visible = tl.load(visible_ids + clip * (N - M) + s - M, mask=valid & (s >= M), other=0)
    patch = tl.where(hidden, masked, visible)
    tl.store(is_masked + clip * N + patch, hidden.to(tl.int8), mask=valid)


@triton.jit(do_not_specialize=["num_matmuls", "num_visible", "num_patches", "V", "M", "share"])
def _weight_grad_kernel(
    fbank, strides, mean, scale, grad, mask_ids, visible_ids, partial, is_masked, num_matmuls,
    num_visible, num_patches, V, M, share,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < num_matmuls:
        _weight_grad(
            pid, fbank, strides, mean, scale, grad, visible_ids, partial, num_visible, V, share,
            D, N, PREFIX, COLUMNS, PATCH, STRIDE, TILE, STEPS, ROWS, WIDTH,
        )  # fmt: skip
    else:
        _flag(pid - num_matmuls, mask_ids, visible_ids, is_masked, num_patches, M, N, FLAGS)


@triton.jit(do_not_specialize=["B"])
def _token_grad_kernel(
    grad, is_masked, dpos, partial, B,
    D: tl.constexpr, N: tl.constexpr, PREFIX: tl.constexpr, CLIPS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum over the batch at some positions, and over the visible and the masked ones of these.

    ``partial`` is [2, programs, D] float32, for the bias and for the mask embedding.
    """
    L: tl.constexpr = PREFIX + N
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_patch = (position >= PREFIX) & (position < L)
    inside = (position < L)[:, None] & (d < D)[None, :]
    visible = tl.zeros((ROWS, WIDTH), tl.float32)
    masked = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, B, CLIPS):
        clip = (start + tl.arange(0, CLIPS)).to(tl.int64)
        valid = clip < B
        flag = tl.load(
            is_masked + clip[:, None] * N + (position - PREFIX)[None, :],
            mask=valid[:, None] & is_patch[None, :],
            other=0,
        )
        row = clip[:, None] * L + position[None, :]
        g = tl.load(
            grad + row[:, :, None] * D + d[None, None, :],
            mask=valid[:, None, None] & inside[None],
            other=0.0,
        ).to(tl.float32)
        hidden = (flag != 0)[:, :, None]
        masked += tl.sum(tl.where(hidden, g, 0.0), 0)
        visible += tl.sum(tl.where(hidden, 0.0, g), 0)
    out = dpos + position[:, None] * D + d[None, :]
    tl.store(out, (visible + masked).to(dpos.dtype.element_ty), mask=inside)
    visible = tl.where(is_patch[:, None], visible, 0.0)
    out = partial + tl.program_id(0) * D + d
    tl.store(out, tl.sum(visible, 0), mask=d < D)
    tl.store(out + tl.num_programs(0) * D, tl.sum(masked, 0), mask=d < D)


@triton.jit(do_not_specialize=["splits", "parts"])
def _sum_kernel(
    weight_parts, token_parts, dweight, dbias, dmask_embed, splits, parts,
    D: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (D + WIDTH - 1) // WIDTH
    pid = tl.program_id(0)
    if pid < columns:
        sum_parts(pid, token_parts, dbias, parts, D, PARTS, WIDTH)
    elif pid < 2 * columns:
        masked = token_parts + parts * D
        sum_parts(pid - columns, masked, dmask_embed, parts, D, PARTS, WIDTH)
    else:
        sum_parts(pid - 2 * columns, weight_parts, dweight, splits, D * P, PARTS, WIDTH)


def _tile(patch: Sequence[int], size: int) -> tuple[tuple[int, int], int]:
    """Return mel bins and frames of a tile of about ``size`` elements, and tiles of a patch."""
    frames = min(size, triton.next_power_of_2(patch[1]))
    mels = min(size // frames, triton.next_power_of_2(patch[0]))
    mels = max(mels, 16 // frames)  # a matmul needs 16 elements
    return (mels, frames), triton.cdiv(patch[0], mels) * triton.cdiv(patch[1], frames)


def _columns(fbank: Tensor, patch: Sequence[int], stride: Sequence[int]) -> int:
    """Return the columns of the patch grid; patches are numbered row by row."""
    return (fbank.shape[1] - patch[1]) // stride[1] + 1


def _width(D: int, limit: int) -> int:
    return min(limit, max(32, triton.next_power_of_2(D)))


@on_its_device
def forward(
    fbank: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_embed: Tensor,
    pos_embed: Tensor,
    prefix: Tensor,
    mask_ids: Tensor,
    visible_ids: Tensor,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute tokens and targets, as ``patch_embed`` returns them."""
    D, patch = weight.shape[0], tuple(weight.shape[2:])
    (B, M), V, num_prefix = mask_ids.shape, visible_ids.shape[1], prefix.shape[1]
    tokens = weight.new_empty(B, num_prefix + M + V, D)
    targets = weight.new_empty(B, M, math.prod(patch))
    table = _PROJECT if architecture(fbank.device) in (90, 100) else _PROJECT_SM80
    blocks = table[weight.element_size()]
    tile, steps = _tile(patch, blocks.tile)
    fill_tile, fill_steps = _tile(patch, _FILL_TILE)
    width = _width(D, blocks.width)
    num_matmuls = triton.cdiv(B * V, blocks.rows) * triton.cdiv(D, width)
    programs = num_matmuls + B * triton.cdiv(num_prefix + M, _FILL_ROWS)
    _patch_embed_kernel[(programs,)](
        fbank, fbank.stride(), mean, 0.5 / std, weight.contiguous(), bias.contiguous(),
        mask_embed.contiguous(), pos_embed.contiguous(), prefix.contiguous(),
        mask_ids.contiguous(), visible_ids.contiguous(), tokens, targets,
        num_matmuls, B * V, V, M,
        D=D, N=M + V, PREFIX=num_prefix, PATCH=patch, STRIDE=tuple(stride),
        COLUMNS=_columns(fbank, patch, stride),
        TILE=tile, STEPS=steps, ROWS=blocks.rows, WIDTH=width,
        FILL_TILE=fill_tile, FILL_STEPS=fill_steps, FILL_ROWS=_FILL_ROWS,
        FILL_WIDTH=_width(D, 256), num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return tokens, targets


@on_its_device
def backward(
    grad: Tensor,
    fbank: Tensor,
    weight: Tensor,
    mask_ids: Tensor,
    visible_ids: Tensor,
    mean: float,
    std: float,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of weight, bias, mask_embed and pos_embed, in the dtype of ``grad``."""
    D, patch = weight.shape[0], tuple(weight.shape[2:])
    (B, M), V, P = mask_ids.shape, visible_ids.shape[1], math.prod(patch)
    N, L = M + V, grad.shape[1]
    grad, mask_ids, visible_ids = grad.contiguous(), mask_ids.contiguous(), visible_ids.contiguous()
    dweight, dpos = grad.new_empty(weight.shape), grad.new_empty(1, L, D)
    dbias, dmask_embed = grad.new_empty(D), grad.new_empty(D)

    blocks = _WEIGHT_GRAD[grad.element_size()]
    tile, steps = _tile(patch, blocks.tile)
    width = _width(D, blocks.width)
    matmuls = triton.cdiv(D, width) * steps
    # Two programs on a multiprocessor; more would only make more partial results.
    splits = max(1, 2 * MULTIPROCESSORS.get(architecture(grad.device), 84) // matmuls)
    share = max(1, triton.cdiv(triton.cdiv(B * V, splits), blocks.rows)) * blocks.rows
    splits = triton.cdiv(B * V, share)
    weight_parts = grad.new_empty(splits, D, P, dtype=torch.float32)
    is_masked = grad.new_empty(B, N, dtype=torch.int8)
    flags = 1024
    _weight_grad_kernel[(splits * matmuls + triton.cdiv(B * N, flags),)](
        fbank, fbank.stride(), mean, 0.5 / std, grad, mask_ids, visible_ids, weight_parts,
        is_masked, splits * matmuls, B * V, B * N, V, M, share,
        D=D, N=N, PREFIX=L - N, PATCH=patch, STRIDE=tuple(stride),
        COLUMNS=_columns(fbank, patch, stride),
        TILE=tile, STEPS=steps, ROWS=blocks.rows, WIDTH=width, FLAGS=flags,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    rows, width = 4, _width(D, 256)
    clips = 8 if grad.element_size() == 4 else 4
    parts = triton.cdiv(L, rows)
    token_parts = grad.new_empty(2, parts, D, dtype=torch.float32)
    _token_grad_kernel[(parts, triton.cdiv(D, width))](
        grad, is_masked, dpos, token_parts, B,
        D=D, N=N, PREFIX=L - N, CLIPS=clips, ROWS=rows, WIDTH=width, num_warps=4,
    )  # fmt: skip
    _sum_kernel[(2 * triton.cdiv(D, 128) + triton.cdiv(D * P, 128),)](
        weight_parts, token_parts, dweight, dbias, dmask_embed, splits, parts,
        D=D, P=P, PARTS=16, WIDTH=128, num_warps=4,
    )  # fmt: skip
    return dweight, dbias, dmask_embed, dpos
