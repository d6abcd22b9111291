"""Masks on CUDA: one program draws the mask of one clip, bit for bit that of masking.py.

And the rows of noise of its patches, bit for bit those of fill_masked.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssast.kernels.launch import on_its_device

_CENTRES = tl.constexpr(1 << 16)  # as in masking.py


@triton.jit
def _draw(seed, d, clip, epoch, stream):
    """Return draw d (a scalar or a block of them) of a clip, uint32."""
    zero = d * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + d // 4, zero + clip, zero + epoch, zero + stream)
    word = d % 4
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def _draw_below(n, seed, d, clip, epoch, stream):
    word = _draw(seed, d, clip, epoch, stream)
    return tl.umulhi(word, (d * 0 + n).to(tl.uint32)).to(tl.int32)


@triton.jit
def _lowest(keys, ids, N, count):
    """Return flags of the ``count`` ids below N with the smallest (key, id), keys below 2**33."""
    keys = tl.where(ids < N, keys << 16 | ids, 1 << 49)
    bound = tl.sum(ids, 0).to(tl.int64) * 0
    for bit in range(49):  # the largest bound with fewer than count keys below is the last key
        trial = bound | tl.full((), 1, tl.int64) << (48 - bit)
        bound = tl.where(tl.sum((keys < trial).to(tl.int32), 0) < count, trial, bound)
    return (keys <= bound) & (ids < N) & (count > 0)


@triton.jit
def _inverse_blocks(ids, columns, M, seed, clip, epoch, stream, ROWS: tl.constexpr):
    """Return flags of the M ids that are masked around visible blocks in a grid ROWS x columns."""
    N = ROWS * columns
    visible = N - M
    count = (100 * visible + 7 * N) // (
        100 * tl.minimum(columns * 0 + ROWS, 5) * tl.minimum(columns, 5)
    )
    count = tl.maximum(count, 1)
    on = ids < 0
    k = columns * 0
    while k < count:
        centre = _draw_below(N, seed, k + _CENTRES, clip, epoch, stream)
        f = centre // columns - ids // columns
        t = centre % columns - ids % columns
        on |= (f >= -2) & (f <= 2) & (t >= -2) & (t <= 2)
        k += 1
    keys = _draw(seed, ids, clip, epoch, stream).to(tl.int64)
    keys |= (on == 0).to(tl.int64) << 32
    return (_lowest(keys, ids, N, visible) == 0) & (ids < N)


@triton.jit
def _covered(
    ids, columns, M, seed, clip, epoch, stream, ROWS: tl.constexpr, OFFICIAL: tl.constexpr
):
    """Return flags of the M ids that clusters cover in a grid of ROWS x columns."""
    N = ROWS * columns
    zero = columns * 0
    C = 3 + _draw_below(3, seed, zero, clip, epoch, stream)
    need = M + 1 if OFFICIAL else M
    need = tl.where(M > 0, need, 0)
    on = ids < 0
    count = zero
    d = zero + 2
    while count < need:
        if OFFICIAL:
            offset = ids - _draw_below(N, seed, d, clip, epoch, stream)
            # Where columns < C, several (i, j) are one offset: the last i has the smallest j.
            i = tl.minimum(offset // columns, C - 1)
            on |= (offset >= 0) & (offset - i * columns < C)
            on &= (ids > 0) & (ids < N)
        else:
            corners = (ROWS + C - 1) * (columns + C - 1)
            corner = _draw_below(corners, seed, d, clip, epoch, stream)
            f = corner // (columns + C - 1) - ids // columns
            t = corner % (columns + C - 1) - ids % columns
            on |= (f >= 0) & (f < C) & (t >= 0) & (t < C) & (ids < N)
        count = tl.sum(on.to(tl.int32), 0)
        d += 1
    rank = tl.cumsum(on.to(tl.int32), 0) - 1
    if not OFFICIAL:
        rank -= _draw_below(count, seed, zero + 1, clip, epoch, stream)
        rank = tl.where(rank < 0, rank + count, rank)
    return on & (rank < M)


@triton.jit(do_not_specialize=["seed", "stream", "M"])
def _masks_kernel(
    clip_ids,
    epochs,
    streams,
    valid_columns,
    num_masked,
    masked,
    visible,
    seed,
    stream,
    M,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    OWN_STREAMS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per clip."""
    N: tl.constexpr = ROWS * COLUMNS
    b = tl.program_id(0).to(tl.int64)
    clip = tl.load(clip_ids + b).to(tl.int32)
    epoch = tl.load(epochs + b).to(tl.int32)
    if OWN_STREAMS:
        stream += tl.load(streams + b).to(tl.int32)
    masked += b * M
    visible += b * (N - M)
    columns = M * 0 + COLUMNS
    wanted = M
    if PADDED:
        columns = tl.load(valid_columns + b).to(tl.int32)
        wanted = tl.load(num_masked + b).to(tl.int32)
    valid = ROWS * columns
    ids = tl.arange(0, BLOCK)  # within the clip's own columns
    if KIND == "random":
        keys = _draw(seed, ids, clip, epoch, stream).to(tl.int64)
        is_masked = _lowest(keys, ids, valid, wanted)
    elif KIND == "inverse_blocks":
        is_masked = _inverse_blocks(ids, columns, wanted, seed, clip, epoch, stream, ROWS)
    else:
        is_masked = _covered(
            ids, columns, wanted, seed, clip, epoch, stream, ROWS, KIND == "official"
        )
    before = tl.cumsum(is_masked.to(tl.int32), 0) - is_masked.to(tl.int32)
    patches = (ids // columns * COLUMNS + ids % columns).to(tl.int64)
    tl.store(masked + before, patches, mask=is_masked)
    tl.store(visible + ids - before, patches, mask=(ids < valid) & (is_masked == 0))
    if PADDED:  # fills up both lists
        padding = (ids < N) & (ids % COLUMNS >= columns)
        before = tl.cumsum(padding.to(tl.int32), 0) - padding.to(tl.int32)
        room = M - wanted
        tl.store(masked + wanted + before, ids.to(tl.int64), mask=padding & (before < room))
        out = visible + (valid - wanted) + before - room
        tl.store(out, ids.to(tl.int64), mask=padding & (before >= room))


@on_its_device
def draw_masks_on_cuda(
    clip_ids: Tensor,
    epochs: Tensor,
    streams: Tensor | None,
    valid_columns: Tensor | None,
    num_masked: Tensor | None,
    seed: int,
    stream: int,
    kind: str,
    rows: int,
    columns: int,
    M: int,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; see :func:`ssast.kernels.masking.draw_masks`."""
    B, N = len(clip_ids), rows * columns
    masked = torch.empty(B, M, dtype=torch.int64, device=clip_ids.device)
    visible = torch.empty(B, N - M, dtype=torch.int64, device=clip_ids.device)
    block = max(32, triton.next_power_of_2(N))
    _masks_kernel[(B,)](
        clip_ids.contiguous(), epochs.contiguous(),
        clip_ids if streams is None else streams.contiguous(),
        clip_ids if valid_columns is None else valid_columns.contiguous(),
        clip_ids if num_masked is None else num_masked.contiguous(),
        masked, visible, seed, stream, M,
        ROWS=rows, COLUMNS=columns, KIND=kind, OWN_STREAMS=streams is not None,
        PADDED=valid_columns is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return masked, visible


@triton.jit(do_not_specialize=["seed", "K"])
def _noise_rows_kernel(
    clip_ids, epochs, streams, rows, seed, K, N: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per block of patches of a clip."""
    b = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    clip = tl.load(clip_ids + b).to(tl.int32)
    epoch = tl.load(epochs + b).to(tl.int32)
    stream = (tl.load(streams + b) + (1 << 31)).to(tl.int32)
    row = _draw_below(K, seed, ids, clip, epoch, stream)
    tl.store(rows + b * N + ids, row.to(tl.int64), mask=ids < N)


@on_its_device
def noise_rows_on_cuda(
    clip_ids: Tensor, epochs: Tensor, streams: Tensor, seed: int, num_patches: int, table_rows: int
) -> Tensor:
    """Launch the kernel; see :func:`ssast.kernels.fill_masked.noise_rows`."""
    B, N = len(clip_ids), num_patches
    rows = torch.empty(B, N, dtype=torch.int64, device=clip_ids.device)
    block = min(512, max(32, triton.next_power_of_2(N)))
    _noise_rows_kernel[(B, triton.cdiv(N, block))](
        clip_ids.contiguous(), epochs.contiguous(), streams.contiguous(), rows,
        seed, table_rows, N=N, BLOCK=block,
    )  # fmt: skip
    return rows
